"""How long, how fast and on how much text a student is trained, and the training with its resume point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdcli import families
from kdcli.context import Context
from kdcli.inputs import text
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models import students
from kdcli.models.checkpoint import Checkpoint
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.distill.plan import DistillPlan
from kdcli.training import resumable
from kdcli.training.loop import BatchLoss, FitOptions, FitResult
from kdcli.training.resumable import TrainingId

BATCH_SIZE = 128
# Without --augment and --epochs the work is bounded in tokens, because that is what it costs. Measured for a
# student of 2x128 on CLINC150: 3 versions of a row 92.6% on validation, 5 versions 92.9% after as many steps; 0.3 M
# rows of 11 tokens seen in training 92.8%, 0.6 M rows 93.6%.
FURTHER_TOKENS = 850_000  # of the extra texts, for the teacher to read
SEEN_TOKENS = 4_800_000  # that the student reads in training
MOST_VERSIONS = 16  # of one row
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20


def augmented(plan: DistillPlan, tokens: float) -> int:
    """How many extra texts a row gets, of so many tokens in all: as asked, else by the tokens."""
    if plan.options.augment is not None:
        return plan.options.augment
    if plan.hard_weight >= 1:  # nobody would look at their teacher's answers
        return 0
    return min(MOST_VERSIONS, round(FURTHER_TOKENS / tokens))


def default_epochs(tokens: float) -> int:
    """Epochs over texts of so many tokens in all, augmented ones among them."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(SEEN_TOKENS / tokens)))


def fit_options(context: Context, plan: DistillPlan, made: students.Student, rows: Encoded) -> FitOptions:
    """How to train this student."""
    options = plan.options
    return FitOptions(
        epochs=options.epochs or default_epochs(len(rows.ids)),
        batch_size=options.batch_size or BATCH_SIZE,
        lr=options.lr or default_rate(made),
        weight_decay=plan.settings.weight_decay,
        warmup=plan.settings.warmup,
        patience=plan.settings.patience,
        seed=context.seed,
    )


def default_rate(made: students.Student) -> float:
    """Peak learning rate of AdamW by kind and width; trained weights want a gentler one."""
    own = families.presumed(made.checkpoint.model_type).rate
    if own is not None:
        return own
    hidden = int(made.checkpoint.config.hidden_size)
    rate = 2e-3 if hidden <= 128 else 1e-3 if hidden <= 256 else 4e-4 if hidden <= 512 else 2e-4
    return rate / 2 if made.init in ("hub", "checkpoint") else rate


def run_fit(
    context: Context,
    trained: Checkpoint,
    rows: Encoded,
    loss: BatchLoss,
    options: FitOptions,
    title: str,
    *,
    model: nn.Module | None = None,
    extra: nn.Module | None = None,
) -> FitResult:
    """Fit with a resume point of its own, whose identity names every option and file.

    Args:
        context: Of the stage.
        trained: What is trained, or, where ``model`` is, whose padding and task that has.
        rows: Training rows.
        loss: Of one batch.
        options: How to train.
        title: Of the training, for people and for its resume point.
        model: Several models that train together, or a part of one.
        extra: Parameters that are trained along and thrown away.
    """
    request = context.request
    identity: dict[str, Any] = {
        "training": title,
        "teacher": checkpoints.weights_digest(context.checkpoint.path),
        "seed": context.seed,
        "device": context.device.type,
        "training rows": text.fingerprint(rows),
        "validation rows": text.fingerprint(context.encoded["validation"]),
    }
    own = request.options_as(DistillOptions)
    chosen = own.model_dump() | {f"--set {k}": v for k, v in request.common.settings.items()}
    identity |= {f"option {key}": value for key, value in chosen.items()}
    identity["file student"] = _digest_of(own.student)
    training = TrainingId(title=f"training the {title}", place=title.replace(" ", "-"), identity=identity)
    return resumable.run(context, training, trained, rows, loss, options, model=model, extra=extra)


def _digest_of(student: str) -> str | None:
    path = Path(student)
    return checkpoints.weights_digest(path) if path.is_dir() else None
