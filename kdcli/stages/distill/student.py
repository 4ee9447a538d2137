"""What every strategy does: make a student, give it texts, and say afterwards how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kdcli import families
from kdcli.context import Context
from kdcli.errors import UnavailableError, UsageError
from kdcli.families import bert
from kdcli.inputs import augment, text
from kdcli.inputs.text import Encoded
from kdcli.models import references, students
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_
from kdcli.stages.distill.fitting import augmented
from kdcli.stages.distill.options import STUDENT_PRESETS, DistillOptions
from kdcli.stages.distill.plan import DistillPlan
from kdcli.training import layer_map, number_head, vocabulary
from kdcli.training.loop import FitOptions, FitResult
from kdcli.training.terms import LossSetting, Shape

NEIGHBOURS = 8  # tokens that may stand for a token


@dataclass
class Taught:
    """A student that has been trained."""

    made: students.Student
    options: FitOptions
    result: FitResult
    detail: dict[str, Any]
    steps: int  # of all its phases
    warnings: list[Warning_] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.made.checkpoint


def precheck(plan: DistillPlan, teacher: Shape) -> None:
    """Refuse methods and layer maps that mean nothing for a teacher and a student of these sizes.

    Args:
        plan: Methods and student.
        teacher: With as many classes as the student is going to have.

    Raises:
        UsageError: Says which and why.
    """
    size = students.size_of(plan.options.student, STUDENT_PRESETS)
    if size is None:  # a checkpoint of the user's own: known when it is loaded
        return
    student = Shape(*size, max(1, size[1] // students.HEAD_SIZE), teacher.classes, size[1])
    spec = plan.options.layer_map
    pairs = (
        layer_map.resolve(spec, student.layers, teacher.layers) if student.layers and teacher.layers else []
    )
    reads = False
    for one in plan.chosen:
        setting = LossSetting(one.config, student, teacher, pairs)
        one.method.check(setting)
        needs = one.method.needs(setting)[0]
        reads = reads or bool(needs.hidden or needs.attention)
    if spec is not None and not reads:
        names = ", ".join(one.name for one in plan.chosen)
        raise UsageError(
            f"--layer-map {spec} maps layers, and no chosen method compares any (chosen: {names})",
            "add a method that does, such as --method hidden, or leave --layer-map out",
        )


@dataclass(frozen=True)
class Texts:
    """What a student reads: the training rows and, after them, texts made from them, which have no labels."""

    rows: Encoded
    origins: augment.Origins | None = None  # of the extra texts; None when there are none


def rows_of(context: Context, plan: DistillPlan, teacher: Checkpoint) -> Texts:
    """The training rows and, after them, their augmented versions, which have no labels."""
    train = context.encoded["train"]
    assert train.labels is not None
    count = augmented(plan, len(train.ids))
    if not count:
        return Texts(train)
    tokenizer = teacher.tokenizer
    special = set(tokenizer.all_special_ids)
    near = vocabulary.near_tokens(teacher, NEIGHBOURS, context.progress)
    more, origins = augment.augment(
        train,
        count,
        seed=plan.settings.augment_seed,
        special=special,
        mask_id=tokenizer.mask_token_id,
        neighbours=near,
    )
    new = augment.unlike(more, train)
    more = more.take(new)
    context.progress.note(f"{len(more)} extra texts made from {len(train)}, for the teacher to label")
    return Texts(
        text.concatenate(train, more, teacher.task.unlabelled(1, len(context.checkpoint.labels))),
        origins.take(new),
    )


def make(
    context: Context, plan: DistillPlan, teacher: Checkpoint, name: str, *, seed: int | None = None
) -> students.Student:
    """The student called ``name``, with its first weights, on the device."""
    options, offline = context.request.options_as(DistillOptions), context.request.common.offline

    def published(preset: str) -> Path:
        if teacher.model_type != bert.FAMILY.name:
            raise UnavailableError(f"the published miniatures are BERT, the teacher is {teacher.model_type}")
        return references.resolve_student(preset, offline=offline).path

    made = students.build(
        name,
        teacher,
        context.checkpoint.labels,
        STUDENT_PRESETS,
        init=options.init,
        seed=context.seed if seed is None else seed,
        hub=published,
        resolve=lambda ref: references.resolve(ref, offline=offline).path,
        vectors=lambda: vocabulary.token_vectors(teacher, context.progress),
        pairs=context.dataset.splits["train"].second is not None,
    )
    made.checkpoint.task = teacher.task.opened()
    train = context.encoded["train"]
    if train.labels is not None and (made.init != "checkpoint" or not made.checkpoint.has_head):
        number_head.start(made.checkpoint, train.labels)
    made.checkpoint.model.to(context.device)
    set_dropout(made.checkpoint, plan.settings.dropout)
    for note in made.notes:
        context.progress.note(note)
    return made


def set_dropout(student: Checkpoint, rate: float | None) -> None:
    """Set every dropout of a model; the configuration that is saved keeps the family's usual one.

    By default it is what the family says.
    """
    if rate is None:
        rate = families.presumed(student.model_type).dropout
    for module in student.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def params(plan: DistillPlan, taught: Taught) -> dict[str, Any]:
    """What decided the result, for the report."""
    options = taught.options
    return {
        "strategy": plan.options.strategy,
        "student": plan.options.student,
        "init": taught.made.init,
        "alpha": round(1 - plan.hard_weight, 9),
        "methods": {c.name: c.config.model_dump() | {"weight": c.weight} for c in plan.chosen},
        "epochs": options.epochs,
        "lr": options.lr,
        "batch_size": options.batch_size,
        **plan.settings.model_dump(exclude_none=True),
    }


def describe(context: Context, teacher: dict[str, Any], taught: Taught, rows: Encoded) -> dict[str, Any]:
    """How teacher (its own detail) and student came about, for the report."""
    train = context.encoded["train"]
    assert train.labels is not None
    made, known = taught.made, context.checkpoint.task.known(train.labels)
    return {
        "teacher": teacher,
        "init": {"from": made.init, "notes": made.notes, "no_published_weights": made.no_hub},
        **taught.detail,
        "rows": {
            "labelled": int(known.sum()),
            "unlabelled": int((~known).sum()),
            "augmented": len(rows) - len(train),
            "choosing": len(context.encoded["validation"]),
        },
    }
