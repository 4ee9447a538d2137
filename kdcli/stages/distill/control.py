"""The same student trained without its teacher, so that nobody mistakes training for distillation.

What helps a student is not the teacher alone: it reads extra texts, which the teacher answers but which carry the
labels of the rows they were made from, too. So there are several controls, from the same first weights and for as many
steps: the labels alone; the labels of the rows and of the same extra texts; and, where the student has no dropout
because the teacher's answers regularise it enough, the latter with dropout. The student is compared with the best.

What the controls share with the student: its first weights, which come from the teacher unless ``--init`` says
otherwise, and the texts, whose substitutes for a word are the teacher's. A text made of two rows has both labels, each
as far as its tokens go.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.inputs import batching
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.picked import pick
from kdcli.inputs.text import Encoded
from kdcli.models.checkpoint import Checkpoint
from kdcli.report import metrics
from kdcli.report.facts import SIGNIFICANT
from kdcli.report.findings import control_words
from kdcli.report.schema import Warning_
from kdcli.stages.distill.fitting import run_fit
from kdcli.stages.distill.student import Taught, Texts, set_dropout
from kdcli.tasks.task import Task
from kdcli.training.first_token import first_token_only
from kdcli.training.label_loss import label_loss, mixed_label_loss
from kdcli.training.loop import BatchLoss, FitOptions, evaluate, inference
from kdcli.training.terms import Needs

CONTROL_STEPS = 50  # the fewest of an epoch
CONTROL_DROPOUT = (
    0.1  # of the second control, where the student has none: that of BERT, arXiv:1810.04805, A.2
)


@dataclass(frozen=True)
class Lesson:
    """What one control learns from."""

    name: str
    rows: Encoded  # with labels; those of an extra text are of the first row it was made from
    loss: BatchLoss
    further: int  # texts among the rows
    dropout: float


def lessons(context: Context, taught: Taught, texts: Texts) -> list[Lesson]:
    """The controls of a student: the labels alone, with the same extra texts, and with dropout where it has none.

    Raises:
        UsageError: No training row has a label.
    """
    train = context.encoded["train"]
    assert train.labels is not None
    task = taught.checkpoint.task
    known = np.flatnonzero(task.known(train.labels))
    if not len(known):
        raise UsageError("--control needs labelled rows")
    size = taught.options.batch_size
    usual = dropout_of(taught.checkpoint.model)
    # Few rows are repeated until an epoch has some steps: an epoch ends with a validation.
    rows = train.take(np.tile(known, _repeats(len(known), size)))
    assert rows.labels is not None
    alone = Lesson("labels", rows, label_loss(task, rows.labels, context.device), 0, usual)
    found = [alone]
    if (more := _with_texts(context, task, texts, known, size, usual)) is not None:
        found.append(more)
    if not usual:
        last = found[-1]
        found.append(replace(last, name=f"{last.name}+dropout", dropout=CONTROL_DROPOUT))
    return found


def _with_texts(
    context: Context, task: Task, texts: Texts, known: np.ndarray, size: int, dropout: float
) -> Lesson | None:
    """The labelled rows and the texts that were made from them alone; None when there are none."""
    labels, origins = context.encoded["train"].labels, texts.origins
    if labels is None or origins is None:
        return None
    first, second, share = labels[origins.first], labels[origins.second], origins.share
    # A text counts when every row that left a token in it has a label.
    more = np.flatnonzero((task.known(first) | (share == 0)) & (task.known(second) | (share == 1)))
    if not len(more):
        return None
    first, second, share = first[more], second[more], share[more]
    at = np.concatenate([known, len(labels) + more])
    in_first, in_second = (part.reshape(-1, *[1] * (labels.ndim - 1)) for part in (share > 0, share < 1))
    own = np.concatenate([labels[known], np.where(in_first, first, second)])
    other = np.concatenate([labels[known], np.where(in_second, second, first)])
    whole = np.concatenate([np.ones(len(known)), share])
    every = np.tile(np.arange(len(at)), _repeats(len(at), size))
    rows = texts.rows.take(at[every])
    loss = mixed_label_loss(task, own[every], other[every], whole[every], context.device)
    return Lesson("labels+texts", replace(rows, labels=own[every]), loss, len(more), dropout)


def control(
    context: Context, taught: Taught, weights: dict[str, Tensor], texts: Texts, *, steps: int | None = None
) -> tuple[dict[str, Any], list[Warning_]]:
    """Train the student's controls and compare it with the best of them.

    Args:
        context: Of the stage.
        taught: The student.
        weights: Those it had before any distillation.
        texts: What it read.
        steps: That went into its weights; by default those of its training.
    """
    picked = pick(context.dataset, None, None)
    split, measured = picked.split, picked.of(context.encoded)
    runs, given, decided = [], [], []
    for lesson in lessons(context, taught, texts):
        other = copy.copy(taught.checkpoint)
        other.model = copy.deepcopy(taught.checkpoint.model)
        other.model.load_state_dict(weights)
        set_dropout(other, lesson.dropout)
        an_epoch = -(-len(lesson.rows) // taught.options.batch_size)
        epochs = max(1, round((steps or taught.steps) / an_epoch))
        options = FitOptions(**(asdict(taught.options) | {"epochs": epochs, "patience": None}))
        title = "control" if lesson.name == "labels" else f"control {lesson.name}"
        with first_token_only(other, Needs()):
            result = run_fit(context, other, lesson.rows, lesson.loss, options, title)
        given.append(answers(other, measured))
        decided.append(_decided(context, other))
        runs.append(
            {
                "name": lesson.name,
                "further_texts": lesson.further,
                "dropout": lesson.dropout,
                "training": result.detail(),
            }
        )
    own = answers(taught.checkpoint, measured)
    found, warnings = compare(_decided(context, taught.checkpoint), own, decided, given, runs, measured)
    found["split"] = split
    words = control_words(found)
    if words is not None:
        context.progress.note(words)
    return found, warnings


def _decided(context: Context, model: Checkpoint) -> Task:
    """The task as the model would ship with it: what validation rows decide, each model decides for itself."""
    rows = context.encoded["validation"]
    if not model.task.decides:
        return model.task
    assert rows.labels is not None
    known = rows.take(np.flatnonzero(model.task.known(rows.labels)))
    assert known.labels is not None
    return model.task.fitted(answers(model, known), known.labels)


def compare(
    task: Task,
    student: np.ndarray,
    tasks: Sequence[Task],
    controls: Sequence[np.ndarray],
    runs: Sequence[dict[str, Any]],
    rows: Encoded,
) -> tuple[dict[str, Any], list[Warning_]]:
    """What the teacher gave, row by row, and a warning when that is no more than noise.

    Args:
        task: Of the student.
        student: Logits (N, C).
        tasks: Of each control.
        controls: Logits (N, C) of each control.
        runs: What each of them is, for the report.
        rows: N labelled rows.

    Returns:
        ``runs``, each with its score, the student's gain over it and the p-value of that, and the name of the best
        one. The best is the best on these rows, which is in its favour and not in the teacher's.
    """
    labels = rows.labels
    assert labels is not None
    own, metric = task.score(student, labels, rows.queries), task.primary
    value = metrics.of(metric).of_score
    made = []
    for run, other, given in zip(runs, tasks, controls, strict=True):
        score = other.score(given, labels, rows.queries)
        p_value = task.compare(given, student, labels, rows.queries, first=other).p_value
        made.append(run | {metric: value(score), "gain": own - score, "p_value": p_value})
    best = min(made, key=lambda run: float(run["gain"]))
    found = {
        "metric": metric,
        f"student_{metric}": value(own),
        metric: best[metric],
        "best": best["name"],
        "rows": len(labels),
        "runs": made,
    }
    if best["gain"] > 0 and best["p_value"] is not None and best["p_value"] < SIGNIFICANT:
        return found, []
    return found, [Warning_(code="no-gain", message=f"the teacher did not help: {_without(best, metric)}")]


def _without(best: dict[str, Any], name: str) -> str:
    metric, gain = metrics.of(name), best["gain"]
    reached = f"without it the student reaches {metric.percent(best[name])} ({metric.title})"
    if gain <= 0:
        return f"{reached}, better by {metric.points(gain)}"
    return f"{reached}, and {metric.points(gain)} are no more than noise (p = {best['p_value']:.2g})"


def _repeats(rows: int, size: int) -> int:
    return max(1, -(-CONTROL_STEPS * size // rows))


def dropout_of(model: nn.Module) -> float:
    """The highest rate of a model's dropouts."""
    return max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0)


@torch.inference_mode()
def answers(model: Checkpoint, rows: Encoded) -> np.ndarray:
    """Logits (N, C) of a model of the data's own vocabulary."""
    model.model.eval()
    run = torch_runner(model)
    found = np.empty((len(rows), len(model.labels)), dtype=np.float32)
    for at in batching.inference_batches(rows.lengths, 128):
        found[at] = run(batching.collate(rows, at, model.pad_id))
    return found


@torch.inference_mode()
def score(context: Context, model: Checkpoint, split: str) -> float:
    """The task's, of a model of the data's own vocabulary on one split."""
    rows = context.encoded[split]
    found, _ = evaluate(model.task, model.model, rows, inference(rows, 128, model.pad_id), context.device)
    return found
