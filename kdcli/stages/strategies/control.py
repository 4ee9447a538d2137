"""The same student trained without its teacher, so that nobody mistakes training for distillation."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.data.text import Encoded
from kdcli.errors import UsageError
from kdcli.methods.signals import Needs
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_
from kdcli.stages.context import Context
from kdcli.stages.strategies.fitting import run_fit
from kdcli.stages.strategies.student import Taught
from kdcli.training.loop import FitOptions, evaluate, inference
from kdcli.training.losses import cross_entropy
from kdcli.training.shortcut import first_token_only

CONTROL_STEPS = 50  # the fewest of an epoch


def control(
    context: Context, taught: Taught, weights: dict[str, Tensor], rows: Encoded
) -> tuple[dict[str, Any], list[Warning_]]:
    """The same student from the same weights on the same labelled rows for as many steps, without the teacher."""
    student = taught.checkpoint
    other = copy.copy(student)
    other.model = copy.deepcopy(student.model)
    other.model.load_state_dict(weights)
    assert rows.labels is not None
    labelled = rows.take(np.flatnonzero(rows.labels >= 0))
    assert labelled.labels is not None
    if not len(labelled):
        raise UsageError("--control needs labelled rows")
    size = taught.options.batch_size
    # Few rows are repeated until an epoch has some steps: an epoch ends with a validation.
    repeats = -(-CONTROL_STEPS * size // len(labelled))
    labelled = labelled.take(np.tile(np.arange(len(labelled)), max(1, repeats)))
    assert labelled.labels is not None
    epochs = max(1, round(taught.steps / -(-len(labelled) // size)))
    options = FitOptions(**(asdict(taught.options) | {"epochs": epochs, "patience": None}))
    loss = cross_entropy(labelled.labels, context.device)
    with first_token_only(other, Needs()):
        result = run_fit(context, other.model, other.pad_id, labelled, loss, options, "control")
    found: dict[str, Any] = {"training": result.detail()}
    split = "test" if "test" in context.encoded else "validation"
    for name, model in (("accuracy", other), ("student_accuracy", student)):
        found[name] = accuracy(context, model, split)
    found["split"] = split
    gain = found["student_accuracy"] - found["accuracy"]
    context.progress.note(
        f"{split} accuracy: {found['student_accuracy']:.1%} distilled, {found['accuracy']:.1%} without the teacher"
    )
    if gain > 0:
        return found, []
    words = (
        f"the teacher did not help: without it the student reaches {found['accuracy']:.1%} ({-gain:.1%} more)"
    )
    return found, [Warning_(code="no-gain", message=words)]


@torch.inference_mode()
def accuracy(context: Context, model: Checkpoint, split: str) -> float:
    """Accuracy of a model of the data's own vocabulary on one split."""
    rows = context.encoded[split]
    found, _ = evaluate(model.model, rows, inference(rows, 128, model.pad_id), context.device)
    return found
