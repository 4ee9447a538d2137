"""A training of a stage, which goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kdcli.context import Context
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.training.loop import BatchLoss, FitOptions, FitResult, fit
from kdcli.training.resume import ResumePoint


@dataclass(frozen=True, kw_only=True)
class TrainingId:
    """What one training is called.

    Attributes:
        title: For people.
        place: Folder of its resume point, among those of the stage.
        identity: What must be equal for a resumed run to be the same run.
    """

    title: str
    place: str
    identity: Mapping[str, Any]


def run(
    context: Context,
    training: TrainingId,
    trained: Checkpoint,
    rows: Encoded,
    loss: BatchLoss,
    options: FitOptions,
    *,
    model: nn.Module | None = None,
    extra: nn.Module | None = None,
    after_step: Callable[[], None] | None = None,
    begin: Callable[[Encoded], None] | None = None,
) -> FitResult:
    """Fit, judged by the validation rows of a context, with a resume point in its ``resume_dir``.

    Args:
        context: Of the stage.
        training: Its names.
        trained: What is trained, or, where ``model`` is, whose padding and task that has.
        rows: Training rows.
        loss: Of one batch.
        options: How to train.
        model: Several models that train together, or a part of one.
        extra: As in :func:`kdcli.training.loop.fit`.
        after_step: As there.
        begin: As there.
    """
    return fit(
        trained.model if model is None else model,
        rows,
        context.encoded["validation"],
        loss,
        options,
        pad_id=trained.pad_id,
        device=context.device,
        progress=context.progress,
        title=training.title,
        resume=ResumePoint(context.resume_dir / training.place, training.identity),
        resuming=context.request.common.resume,
        after_step=after_step,
        extra=extra,
        begin=begin,
        task=trained.task,
    )


def identity_of(context: Context) -> dict[str, Any]:
    """What decides a training of the model that came in on the data that came with it."""
    request = context.request
    return {
        "stage": request.stage,
        "model": checkpoints.weights_digest(context.checkpoint.path),
        "options": str(request.options),
        "settings": dict(request.common.settings),
        "seed": context.seed,
        "data": context.dataset.fingerprint,
    }


def labels_of(rows: Encoded, trained: Checkpoint) -> np.ndarray:
    """The rows' labels, or none for every row."""
    if rows.labels is not None:
        return rows.labels
    return trained.task.unlabelled(len(rows), len(trained.labels))
