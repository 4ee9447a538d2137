"""What every strategy does: make a student, give it texts, train it on a teacher's signals."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import methods
from kdcli.data import augment, text
from kdcli.data.text import Encoded
from kdcli.errors import UnavailableError, UsageError
from kdcli.methods import layer_map
from kdcli.methods.signals import Needs, Setting, Shape, check
from kdcli.models import checkpoint as checkpoints
from kdcli.models import placement, references, students
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_
from kdcli.stages.base import STUDENT_PRESETS, DistillOptions
from kdcli.stages.context import Context
from kdcli.stages.strategies.plan import Plan, teacher_weights
from kdcli.training import features, objective, vocabulary
from kdcli.training import teacher as teachers
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import Stored, TeacherSignals
from kdcli.training.loop import FitOptions, FitResult, Loss, evaluate, fit, inference
from kdcli.training.losses import UNLABELLED, cross_entropy
from kdcli.training.objective import Chosen
from kdcli.training.resume import ResumePoint
from kdcli.training.shortcut import first_token_only

NEIGHBOURS = 8  # tokens that may stand for a token
BATCH_SIZE = 128
# Without --augment and --epochs the work is bounded in tokens, because that is what it costs. Measured for a
# student of 2x128 on CLINC150: 3 versions of a row 92.6% on validation, 5 versions 92.9% after as many steps; 0.3 M
# rows of 11 tokens seen in training 92.8%, 0.6 M rows 93.6%.
FURTHER_TOKENS = 850_000  # of the further texts, for the teacher to read
SEEN_TOKENS = 4_800_000  # that the student reads in training
MOST_VERSIONS = 16  # of one row
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
CONTROL_STEPS = 50  # the fewest of an epoch
FIRST_PHASE = 1 / 3  # of the epochs, when there are two phases
TRIAL_EPOCHS, TRIAL_ROWS = 3, 15_000  # of the trial that decides between one phase and two


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


def options_of(context: Context) -> DistillOptions:
    """The request's options, typed."""
    options = context.request.options
    assert isinstance(options, DistillOptions)
    return options


def precheck(context: Context, plan: Plan) -> None:
    """Refuse methods and layer maps that mean nothing for these models, before anything is trained.

    Raises:
        UsageError: Says which and why.
    """
    size = students.size_of(plan.options.student, STUDENT_PRESETS)
    if size is None:  # a checkpoint of the user's own: known when it is loaded
        return
    teacher = shape_of(context.checkpoint)
    teacher = replace(teacher, classes=len(context.checkpoint.labels))
    student = Shape(*size, max(1, size[1] // students.HEAD_SIZE), teacher.classes, size[1])
    spec = plan.options.layer_map
    pairs = (
        layer_map.resolve(spec, student.layers, teacher.layers) if student.layers and teacher.layers else []
    )
    for one in plan.chosen:
        check(one.module, Setting(one.config, student, teacher, pairs))


def rows_of(context: Context, plan: Plan, teacher: Checkpoint) -> Encoded:
    """The training rows and, after them, their augmented versions, which have no labels."""
    train = context.encoded["train"]
    assert train.labels is not None
    count = augmented(plan, len(train.ids))
    if not count:
        return train
    tokenizer = teacher.tokenizer
    special = set(tokenizer.all_special_ids)
    near = vocabulary.near_tokens(teacher, NEIGHBOURS, context.progress)
    more = augment.augment(
        train,
        count,
        seed=plan.settings.augment_seed,
        special=special,
        mask_id=tokenizer.mask_token_id,
        neighbours=near,
    )
    more = more.take(augment.unlike(more, train))
    context.progress.note(f"{len(more)} further texts made from {len(train)}, for the teacher to label")
    return text.concatenate(train, more, UNLABELLED)


def augmented(plan: Plan, tokens: float) -> int:
    """How many further texts a row gets, of so many tokens in all: as asked, else by the tokens."""
    if plan.options.augment is not None:
        return plan.options.augment
    if plan.hard_weight >= 1:  # nobody would look at their teacher's answers
        return 0
    return min(MOST_VERSIONS, round(FURTHER_TOKENS / tokens))


def default_epochs(tokens: float) -> int:
    """Epochs over texts of so many tokens in all, augmented ones among them."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(SEEN_TOKENS / tokens)))


def make(
    context: Context, plan: Plan, teacher: Checkpoint, name: str, *, seed: int | None = None
) -> students.Student:
    """The student called ``name``, with its first weights, on the device."""
    options, offline = options_of(context), context.request.common.offline

    def published(preset: str) -> Path:
        if teacher.model_type != "bert":
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
    )
    made.checkpoint.model.to(context.device)
    set_dropout(made.checkpoint, plan.settings.dropout)
    for note in made.notes:
        context.progress.note(note)
    return made


def set_dropout(student: Checkpoint, rate: float | None) -> None:
    """Set every dropout of a model; the configuration that is saved keeps the family's usual one.

    By default an encoder has none: the teacher's answers to many texts regularise it enough. Students that see no
    context overfit sooner.
    """
    if rate is None:
        rate = 0.2 if student.model_type in ("kdcli-static", "kdcli-cnn", "kdcli-bilstm") else 0.0
    for module in student.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def place(context: Context, plan: Plan, teacher: Checkpoint) -> None:
    """Spread a teacher that is larger than the device, or than it may be, over all the places there are."""
    limit = plan.settings.teacher_memory_gib
    if teacher.placed is not None or (limit is None and teacher.device == context.device):
        return
    offload = context.resume_dir / f"offload-{checkpoints.weights_digest(teacher.path)[:8]}"
    bytes_ = None if limit is None else int(limit * 2**30)
    placement.spread(teacher, context.device, offload, bytes_)
    context.progress.note(f"teacher {teacher.notes[-1]}")


def soft_targets(context: Context, plan: Plan, taught_by: Sequence[Checkpoint], rows: Encoded) -> np.ndarray:
    """Logits (N, C) to imitate: the teacher's, or those of several teachers as one."""
    found = []
    for teacher in taught_by:
        own = teacher is context.checkpoint and teacher.placed is None
        graph = context.input_graph if own else None
        logits = teachers.outputs(
            teacher, rows, device=context.device, progress=context.progress, graph=graph
        )
        order = [teacher.labels.index(name) for name in context.checkpoint.labels]
        found.append(logits if order == list(range(len(order))) else np.asarray(logits)[:, order])
    if len(found) == 1:
        return found[0]
    temperature = next(
        (float(c.config.temperature) for c in plan.chosen if hasattr(c.config, "temperature")), 1.0
    )
    return features.combined(found, teacher_weights(plan.settings, len(found)), temperature)


def teach(
    context: Context,
    plan: Plan,
    made: students.Student,
    taught_by: Sequence[Checkpoint],
    rows: Encoded,
    *,
    title: str = "student",
) -> Taught:
    """Train a student on the labels and on the signals of its teachers.

    Args:
        context: Of the stage.
        plan: Methods, weights, settings.
        made: The student with its first weights.
        taught_by: Its teachers; features are those of the first.
        rows: Training rows, augmented ones among them; labels are -100 where there are none.
        title: Of the training, for people and for its resume point.
    """
    started = time.perf_counter()
    for teacher in taught_by:
        place(context, plan, teacher)
    targets = soft_targets(context, plan, taught_by, rows)
    lesson = _Lesson(context, plan, made.checkpoint, taught_by[0], rows, targets)
    lesson.seconds += time.perf_counter() - started
    options = fit_options(context, plan, made, rows)
    phases: dict[str, Any] = {"asked": plan.settings.phases}
    two = plan.settings.phases == "two" or (
        plan.settings.phases == "auto" and lesson.trial(options, title, phases)
    )
    phases["used"] = "two" if two else "one"
    first = max(1, round(options.epochs * FIRST_PHASE)) if two and options.epochs > 1 else 0
    steps = 0
    if first:
        done = lesson.features(replace(options, epochs=first, keep="last"), f"{title} features")
        phases["first"], steps = done.detail(), done.steps
    result = lesson.answers(replace(options, epochs=options.epochs - first), title)
    steps += result.steps
    detail = {
        "training": result.detail(),
        "phases": phases,
        "terms": {"labels": plan.hard_weight} | {c.name: c.weight for c in plan.chosen},
        "notes": lesson.notes,
        "layer_map": lesson.pairs_read,
        "teacher_features": asdict(lesson.stored),
        "seconds": {"teacher": round(lesson.seconds, 1), "student": round(result.seconds, 1)},
    }
    context.progress.note(
        f"{title}: teacher {lesson.seconds:.0f} s, student {result.seconds:.0f} s at "
        f"{result.tokens_per_s:,.0f} tokens/s, {result.padding_share:.1%} padding"
    )
    return Taught(made, options, result, detail, steps)


class _Lesson:
    """One student, its teacher and its texts: what the phases of a training share."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        student: Checkpoint,
        teacher: Checkpoint,
        rows: Encoded,
        targets: np.ndarray,
    ) -> None:
        self.context, self.plan = context, plan
        self.student, self.teacher, self.rows, self.targets = student, teacher, rows, targets
        one, two = shape_of(student), shape_of(teacher)
        self.shapes = (one, two)
        self.pairs = (
            layer_map.resolve(plan.options.layer_map, one.layers, two.layers)
            if one.layers and two.layers
            else []
        )
        self.pairs_read: list[list[int]] = []
        self.notes: list[str] = []
        self.stored = Stored("not read", 0)
        self.seconds = 0.0  # spent on the teacher

    def answers(self, options: FitOptions, title: str, rows: np.ndarray | None = None) -> FitResult:
        """The training proper: the chosen methods, and the labels."""
        return self._fit(self.plan.chosen, self.plan.hard_weight, options, title, rows)

    def features(self, options: FitOptions, title: str, rows: np.ndarray | None = None) -> FitResult:
        """The first of two phases: match the vector that the teacher's head reads."""
        pooled = methods.load("distill", "pooled")
        return self._fit([Chosen("pooled", pooled, pooled.Config(), 1.0)], 0.0, options, title, rows)

    def trial(self, options: FitOptions, title: str, found: dict[str, Any]) -> bool:
        """Whether two phases beat one on validation: both run shortly, with as many steps, from the same weights."""
        if options.epochs < 2 or not self.shapes[0].pooled or not self.shapes[1].pooled:
            return False
        train = len(self.context.encoded["train"])
        some = np.arange(min(train, TRIAL_ROWS))
        short = replace(options, epochs=TRIAL_EPOCHS, patience=None)
        weights = copy.deepcopy(self.student.model.state_dict())
        one = self.answers(short, f"{title} trial in one phase", some)
        self.student.model.load_state_dict(weights)
        self.features(replace(short, epochs=1, keep="last"), f"{title} trial features", some)
        two = self.answers(replace(short, epochs=TRIAL_EPOCHS - 1), f"{title} trial in two phases", some)
        self.student.model.load_state_dict(weights)
        found["trial"] = {"one": one.best_accuracy, "two": two.best_accuracy, "rows": len(some)}
        better = two.best_accuracy > one.best_accuracy
        self.context.progress.note(
            f"trial on validation: one phase {one.best_accuracy:.1%}, two {two.best_accuracy:.1%}; "
            f"{'two' if better else 'one'} taken"
        )
        return better

    def _fit(
        self,
        chosen: Sequence[Chosen],
        hard_weight: float,
        options: FitOptions,
        title: str,
        some: np.ndarray | None,
    ) -> FitResult:
        context, student = self.context, self.student
        rows, targets = self.rows, self.targets
        if some is not None:
            rows, targets = rows.take(some), np.asarray(targets[some])
        assert rows.labels is not None
        terms, notes = objective.bind(chosen, *self.shapes, self.pairs, context.seed, context.device)
        for note in notes:
            context.progress.note(note)
        self.notes = notes
        of_student, of_teacher = objective.needs(terms)
        self.pairs_read = [list(p) for p in self.pairs] if of_student.hidden or of_student.attention else []
        started = time.perf_counter()
        signals = TeacherSignals(
            self.teacher,
            rows,
            targets,
            of_teacher,
            budget=int(self.plan.settings.feature_cache_gib * 2**30),
            device=context.device,
            progress=context.progress,
        )
        self.seconds += time.perf_counter() - started
        self.stored = signals.stored
        with closing(signals), Capture(student, of_student) as capture, first_token_only(student, of_student):
            loss = objective.Objective(terms, hard_weight, rows.labels, capture, signals, context.device)
            result = run_fit(
                context, student.model, student.pad_id, rows, loss, options, title, extra=loss.extra
            )
        return result


def fit_options(context: Context, plan: Plan, made: students.Student, rows: Encoded) -> FitOptions:
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
    if made.checkpoint.model_type == "kdcli-static":
        return 3e-3
    hidden = int(made.checkpoint.config.hidden_size)
    rate = 2e-3 if hidden <= 128 else 1e-3 if hidden <= 256 else 4e-4 if hidden <= 512 else 2e-4
    return rate / 2 if made.init in ("hub", "checkpoint") else rate


def run_fit(
    context: Context,
    model: nn.Module,
    pad_id: int,
    rows: Encoded,
    loss: Loss,
    options: FitOptions,
    title: str,
    *,
    extra: nn.Module | None = None,
) -> FitResult:
    """Fit with a resume point of its own, whose identity names every option and file."""
    request = context.request
    identity: dict[str, Any] = {
        "training": title,
        "teacher": checkpoints.weights_digest(context.checkpoint.path),
        "seed": context.seed,
        "device": context.device.type,
        "training rows": text.fingerprint(rows),
        "validation rows": text.fingerprint(context.encoded["validation"]),
    }
    chosen = asdict(options_of(context)) | {f"--set {k}": v for k, v in request.common.settings.items()}
    identity |= {f"option {key}": value for key, value in chosen.items()}
    identity["file student"] = _digest_of(options_of(context).student)
    return fit(
        model,
        rows,
        context.encoded["validation"],
        loss,
        options,
        pad_id=pad_id,
        device=context.device,
        progress=context.progress,
        title=f"training the {title}",
        resume=ResumePoint(context.resume_dir / title.replace(" ", "-"), identity),
        resuming=request.common.resume,
        extra=extra,
    )


def _digest_of(student: str) -> str | None:
    path = Path(student)
    return checkpoints.weights_digest(path) if path.is_dir() else None


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


def params(plan: Plan, taught: Taught) -> dict[str, Any]:
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


def describe(context: Context, taught: Taught, rows: Encoded) -> dict[str, Any]:
    """How teacher and student came about, for the report."""
    train = context.encoded["train"]
    assert train.labels is not None
    made = taught.made
    return {
        "teacher": context.teacher_detail,
        "init": {"from": made.init, "notes": made.notes, "no_published_weights": made.no_hub},
        **taught.detail,
        "rows": {
            "labelled": int((train.labels >= 0).sum()),
            "unlabelled": int((train.labels < 0).sum()),
            "augmented": len(rows) - len(train),
        },
    }
