"""Recovery: distil the model as it came in into the model that surgery left."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from kdcli.context import Context
from kdcli.inputs.splits import Splits
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.transforms import Zero
from kdcli.training import objective, resumable
from kdcli.training import teacher as teachers
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import TeacherSignals
from kdcli.training.loop import FitOptions
from kdcli.training.losses import response
from kdcli.training.objective import ChosenLoss, Objective
from kdcli.training.resumable import TrainingId
from kdcli.training.terms import Needs

ALPHA = 0.9  # the dense model knows more about the removed parts than the labels do
TEMPERATURE = 2.0
BATCH_SIZE = 32


def default_rate(hidden: int) -> float:
    """Peak learning rate of AdamW for an encoder of this width (methods that start from trained weights)."""
    return 1e-4 if hidden <= 384 else 5e-5


def zeros_of(checkpoint: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights that this or an earlier stage of the lineage set to zero: parameters, and True where they are zero.

    The log names the tensors; the weights themselves say where, also after a cut has changed their shapes.
    """
    parameters = dict(checkpoint.model.named_parameters())
    named = {name for t in checkpoint.log.transforms if isinstance(t, Zero) for name in t.tensors}
    found = {name: parameters[name] for name in sorted(named & parameters.keys())}
    return {name: (parameter, parameter.detach() == 0) for name, parameter in found.items()}


def hold_zeros(checkpoint: Checkpoint, *, but: Collection[str] = ()) -> Callable[[], None] | None:
    """What puts the weights of :func:`zeros_of` back to zero after a step; None when there are none.

    Args:
        checkpoint: The model that is about to be trained.
        but: Names of weights that may be filled.
    """
    zeros = [pair for name, pair in zeros_of(checkpoint).items() if name not in but]

    @torch.no_grad()
    def hold() -> None:
        for parameter, zero in zeros:
            parameter.masked_fill_(zero, 0.0)

    return hold if zeros else None


def zero_shares(checkpoint: Checkpoint) -> dict[str, float]:
    """The share of zeros in every tensor of :func:`zeros_of`."""
    return {name: float(zero.float().mean()) for name, (_, zero) in zeros_of(checkpoint).items()}


def recover(
    context: Context,
    *,
    epochs: int,
    lr: float | None = None,
    batch_size: int | None = None,
    after_step: Callable[[], None] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train ``context.checkpoint.model`` for some epochs on the outputs of the model it was before.

    Weights that the log says were set to zero stay zero.

    Args:
        context: Its checkpoint's model was changed in place; its files on disk are the teacher.
        epochs: At least 1.
        lr: Peak rate; by default from the width.
        batch_size: :data:`BATCH_SIZE` by default.
        after_step: Called after every step.
        more: Further arguments of :func:`kdcli.training.resumable.run`; ``keep`` of the options.

    Returns:
        What was done, for the report.
    """
    student, train, task = context.checkpoint, context.encoded["train"], context.checkpoint.task
    dense = checkpoints.load(student.path, device=context.device)
    # Each reads the rows in its own tokens: some of the teacher's may have been dropped from the student.
    same = len(dense.tokenizer) == len(student.tokenizer)
    read = train if same else Splits(context.dataset, dense)["train"]
    targets = teachers.outputs(dense, read, device=context.device, progress=context.progress)
    options = FitOptions(
        epochs=epochs,
        batch_size=batch_size or BATCH_SIZE,
        keep=more.pop("keep", "best"),
        lr=lr or default_rate(int(student.config.hidden_size)),
        seed=context.seed,
    )
    chosen = ChosenLoss("response", response.METHOD, response.Config(temperature=TEMPERATURE), ALPHA)
    terms, _ = objective.bind([chosen], shape_of(student), shape_of(dense), [], context.seed, context.device)
    signals = TeacherSignals(
        dense, read, targets, Needs(), budget=0, device=context.device, progress=context.progress
    )
    labels = resumable.labels_of(train, student)
    loss = Objective(terms, 1 - ALPHA, labels, Capture(student, Needs()), signals, context.device, task)
    hold = hold_zeros(student)

    def end_step() -> None:
        for act in (after_step, hold):
            if act is not None:
                act()

    training = TrainingId(title="recovery", place="recovery", identity=resumable.identity_of(context))
    ends = end_step if hold or after_step else None
    result = resumable.run(context, training, student, train, loss, options, after_step=ends, **more)
    return {
        "alpha": ALPHA,
        "temperature": TEMPERATURE,
        "lr": options.lr,
        "batch_size": options.batch_size,
    } | (result.detail())
