"""Distill: a small student learns from a teacher's outputs.

A teacher without a head for the task is fine-tuned on it first; then the strategy says who teaches whom.
"""

from __future__ import annotations

import importlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdcli.context import Applied, Context, Stage
from kdcli.data import sources
from kdcli.errors import InputError, UsageError
from kdcli.inputs import sampling, text
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models import references
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_
from kdcli.request import Request
from kdcli.stages.distill.foresight import foreseen
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.distill.plan import DistillPlan, check, need_task, teacher_epochs
from kdcli.stages.distill.prepared import Prepared
from kdcli.stages.distill.student import precheck
from kdcli.tasks.task import Task
from kdcli.training import teacher as teachers
from kdcli.training.capture import shape_of
from kdcli.training.loop import FitOptions

_MODULES = {"assistant-chain": "succession", "self": "succession"}


def prepare(context: Context) -> Prepared:
    """Give every teacher a head for the task, and apply the label budget."""
    plan = check(context.request)
    options = plan.options
    need_task(plan, context.checkpoint.task)
    precheck(plan, shape_of(context.checkpoint))
    asked = options.temperature is not None or any(
        key.rpartition(".")[2] == "temperature" for key in context.request.common.settings
    )
    if asked and not context.checkpoint.task.softens:
        context.progress.note(
            "the temperature changes nothing: answers are numbers here, not probabilities that could be softened"
        )
    train, validation = context.encoded["train"], context.encoded["validation"]
    assert train.labels is not None
    if options.labels is not None:
        task = context.checkpoint.task
        groups = sampling.strata(train, task)
        classes = 1 if groups is None else len(np.unique(groups))
        train = _budget(train, options.labels, context.seed, task, len(context.checkpoint.labels))
        count = choosing(options.labels, len(train), len(validation), classes)
        context.deciding = sampling.judged_positions(validation, count, context.seed, task)
        validation = validation.take(context.deciding)
        context.progress.note(
            f"--labels {options.labels}: the labels of {options.labels} training rows teach, "
            f"{len(validation)} validation rows choose"
        )
    teacher = context.checkpoint
    if options.unlabeled is not None:
        extra = sources.load_texts(options.unlabeled, context.request.common.columns, context.dataset.kind)
        more = text.encode(extra, teacher.tokenizer, teacher.max_length, None)
        train = text.concatenate(train, more, teacher.task.unlabelled(1, len(teacher.labels)))
    narrowed = {"train": train, "validation": validation}
    context.encoded = ChainMap(narrowed, context.encoded)  # type: ignore[arg-type]
    came_trained = [] if not teacher.has_head else [options.teachers[0]]
    if options.strategy == "online" and plan.settings.online == "teacher":
        from kdcli.stages.distill.strategies import online

        taught, detail = online.together(context, plan)
        return Prepared(plan, [context.checkpoint], detail, came_trained, taught)
    context.checkpoint, detail = _with_head(context, plan, teacher)
    every = [context.checkpoint]
    for ref in options.teachers[1:]:
        found = references.resolve(ref, offline=context.request.common.offline)
        more_teacher = checkpoints.load(
            found.path, labels=teacher.labels, task=teacher.task.opened(), device=context.device
        )
        if more_teacher.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise InputError(f"teacher '{ref}' has another vocabulary than '{options.teachers[0]}'")
        if more_teacher.has_head:
            _check_alike(ref, more_teacher, options.teachers[0], teacher)
            came_trained.append(ref)
        every.append(_with_head(context, plan, more_teacher)[0])
    return Prepared(plan, every, detail, came_trained)


def apply(context: Context, prepared: Prepared) -> Applied:
    """Run the strategy."""
    plan = prepared.plan
    name = plan.options.strategy
    module = importlib.import_module(
        f"kdcli.stages.distill.strategies.{_MODULES.get(name, name).replace('-', '_')}"
    )
    applied: Applied = module.run(context, prepared)
    if plan.options.labels is not None and prepared.came_trained:
        applied.warnings.append(_saw_more(plan.options.labels, prepared.came_trained))
    return applied


def chosen(request: Request, detail: Mapping[str, Any]) -> list[str]:
    """What the validation rows chose."""
    options = request.options_as(DistillOptions)
    found = ["the epoch", "whether there is a first phase"] if options.epochs != 1 else ["the training"]
    return found + (["the teacher's epoch"] if detail.get("teacher", {}).get("fine_tuned") else [])


STAGE = Stage(prepare, apply, foreseen, chosen, teaches=True)


def _saw_more(labels: int, teachers: Sequence[str]) -> Warning_:
    several = len(teachers) > 1
    return Warning_(
        code="teacher-labels",
        message=f"--labels {labels} bounds what the student and the choice of its epoch see; "
        f"{'the teachers' if several else 'the teacher'} came trained on labels that are not counted here",
    )


def _check_alike(ref: str, one: Checkpoint, first_ref: str, first: Checkpoint) -> None:
    """Refuse a teacher whose answers cannot be averaged with those of the first.

    Raises:
        InputError: It is for another task, knows other labels, or its output is read in another way.
    """
    if one.task.name != first.task.name:
        raise InputError(f"teacher '{ref}' is for {one.task.name}, '{first_ref}' is for {first.task.name}")
    if one.task.order(first.labels, one.labels) is None:
        raise InputError(f"teacher '{ref}' knows other labels than '{first_ref}'")
    ways = [model.task.about(len(model.labels)).get("activation") for model in (one, first)]
    if ways[0] != ways[1]:
        raise InputError(
            f"the output of teacher '{ref}' is read through a different activation ({ways[0]}) than that of "
            f"'{first_ref}' ({ways[1]}), so their answers have no mean",
            "give teachers of one kind",
        )


def choosing(labels: int, train: int, validation: int, classes: int) -> int:
    """How many validation rows may choose when the labels of ``labels`` of ``train`` rows may teach.

    The same share of them, at least a row a class, and never more than teach: whoever has 1,000 labels has no 3,000
    more to choose an epoch with.
    """
    return min(validation, labels, max(classes, round(validation * labels / train)))


def _with_head(
    context: Context, plan: DistillPlan, teacher: Checkpoint
) -> tuple[Checkpoint, dict[str, object]]:
    """The teacher as it is when it has a head for the task, else fine-tuned."""
    if teacher.has_head:
        return teacher, {"fine_tuned": False}
    settings, train = plan.settings, context.encoded["train"]
    assert train.labels is not None
    labelled = int(teacher.task.known(train.labels).sum())
    context.progress.phase("teacher")
    options = FitOptions(
        epochs=settings.teacher_epochs
        or teacher_epochs(teacher.task, labelled, len(teacher.labels), settings.teacher_batch_size),
        batch_size=settings.teacher_batch_size,
        lr=settings.teacher_lr or (1e-4 if int(teacher.config.hidden_size) <= 384 else 3e-5),
        seed=context.seed,
        rate_option="--set teacher_lr=RATE",
    )
    return teachers.fine_tuned(context, teacher, options)


def _budget(train: Encoded, labels: int, seed: int, task: Task, outputs: int) -> Encoded:
    """Keep the labels of ``labels`` rows, as evenly over the task's strata as they come; hide the others."""
    assert train.labels is not None
    groups = sampling.strata(train, task)
    if groups is None:
        groups = np.zeros(len(train), dtype=np.int64)
    classes = np.unique(groups)
    if not len(classes) <= labels <= len(train):
        raise UsageError(
            f"--labels {labels} is out of range: from {len(classes)}, one a label, to {len(train)}, all rows"
        )
    kept = sampling.evenly(groups, labels, seed)
    hidden = task.unlabelled(len(train), outputs)
    hidden[kept] = train.labels[kept]
    return replace(train, labels=hidden)
