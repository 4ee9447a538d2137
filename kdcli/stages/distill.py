"""Distill: a small student learns from a teacher's outputs.

Strategy ``teacher-assisted``: a teacher without a head for the task is fine-tuned on it first; then the
student is trained on the labels and on the teacher's softened outputs, the loss of docs/distillation.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli import methods
from kdcli.data import sources, text
from kdcli.data.text import Encoded
from kdcli.errors import UnavailableError, UsageError, did_you_mean
from kdcli.models import checkpoint as checkpoints
from kdcli.models import references, students
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Method, Warning_
from kdcli.stages.base import INITS, STRATEGIES, STUDENT_PRESETS, DistillOptions, Request
from kdcli.stages.context import Applied, Context
from kdcli.training import teacher as teachers
from kdcli.training.loop import FitOptions, FitResult, evaluate, fit, inference
from kdcli.training.losses import UNLABELLED, cross_entropy, distillation
from kdcli.training.resume import ResumePoint

ALPHA = 0.5


class Settings(BaseModel):
    """What ``--set`` may say about a distillation besides the method's own parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs of fine-tuning a teacher that has no head; by default from rows and labels",
    )
    teacher_lr: float | None = Field(None, gt=0, description="its peak learning rate")
    teacher_batch_size: int = Field(32, ge=1, description="its batch size in rows")
    patience: int = Field(4, ge=1, description="epochs without a better validation before the student stops")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, on matrices")


@dataclass
class _Plan:
    settings: Settings
    soft: Any  # the method's module
    config: Any  # its Config
    alpha: float


def check(request: Request) -> _Plan:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UsageError: An unknown name, a value out of range, or a combination that means nothing.
    """
    options = request.options
    assert isinstance(options, DistillOptions)
    if options.strategy not in STRATEGIES:
        raise UsageError(
            f"unknown strategy '{options.strategy}': {did_you_mean(options.strategy, STRATEGIES)}"
        )
    if options.init not in INITS:
        raise UsageError(f"unknown --init '{options.init}': {did_you_mean(options.init, INITS)}")
    if len(options.methods) != 1:
        raise UsageError("this version distils with one method; give --method once")
    if options.beta or options.gamma or options.weights or options.layer_map:
        raise UsageError(
            "--beta, --gamma, --weight and --layer-map belong to feature and relation methods; none was chosen"
        )
    students.size_of(options.student, STUDENT_PRESETS)
    alpha = ALPHA if options.alpha is None else options.alpha
    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha {alpha} is outside [0, 1]")
    given = dict(request.common.settings)
    own = {k: given.pop(k) for k in list(given) if k in Settings.model_fields}
    module = methods.load("distill", options.methods[0])
    known = [*Settings.model_fields, *module.Config.model_fields]
    for name in given:
        if name not in module.Config.model_fields:
            raise UsageError(f"unknown setting '{name}': {did_you_mean(name, known)}")
    if options.temperature is not None:
        given["temperature"] = str(options.temperature)
    settings = methods.parse_config(Settings, own)
    return _Plan(settings, module, methods.parse_settings(module, given), alpha)


def prepare(context: Context) -> None:
    """Turn the teacher that was loaded into one that has a head for the task, and apply the label budget."""
    plan = check(context.request)
    options, request = _options(context), context.request
    train = context.encoded["train"]
    assert train.labels is not None
    if options.labels is not None:
        train = _budget(train, options.labels, context.seed)
    teacher = context.checkpoint
    if options.unlabeled is not None:
        extra = sources.load_texts(options.unlabeled)
        more = text.encode(extra, teacher.tokenizer, teacher.max_length, None)
        train = text.concatenate(train, more, UNLABELLED)
    context.encoded = {**context.encoded, "train": train}
    if teacher.has_head:
        context.teacher_detail = {"fine_tuned": False}
        return
    settings = plan.settings
    assert train.labels is not None
    context.progress.phase("teacher")
    fit_options = FitOptions(
        epochs=settings.teacher_epochs
        or teacher_epochs(int((train.labels >= 0).sum()), len(teacher.labels), settings.teacher_batch_size),
        batch_size=settings.teacher_batch_size,
        lr=settings.teacher_lr or (1e-4 if int(teacher.config.hidden_size) <= 384 else 3e-5),
        seed=context.seed,
    )
    context.checkpoint, context.teacher_detail = teachers.fine_tuned(
        teacher,
        context.encoded,
        fit_options,
        device=context.device,
        progress=context.progress,
        resume_dir=context.resume_dir,
        resuming=request.common.resume,
    )


def apply(context: Context) -> Applied:
    """Train the student; with ``--control`` train it a second time without the teacher."""
    plan, options, teacher = check(context.request), _options(context), context.checkpoint
    train = context.encoded["train"]
    assert train.labels is not None
    targets = teachers.outputs(teacher, train, device=context.device, progress=context.progress)
    made = _student(context)
    student = made.checkpoint
    for note in made.notes:
        context.progress.note(note)
    first_weights = copy.deepcopy(student.model.state_dict()) if options.control else None
    fit_options = FitOptions(
        epochs=options.epochs or 10,
        batch_size=options.batch_size or 32,
        lr=options.lr or default_rate(int(student.config.hidden_size), made.init),
        weight_decay=plan.settings.weight_decay,
        warmup=plan.settings.warmup,
        patience=plan.settings.patience,
        seed=context.seed,
    )

    def soft(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return plan.soft.loss(logits, teacher_logits, plan.config)

    loss = distillation(train.labels, targets, soft, plan.alpha, context.device)
    result = _fit(context, student, train, loss, fit_options, "student")
    params = {
        "strategy": options.strategy,
        "alpha": plan.alpha,
        **plan.config.model_dump(),
        "student": options.student,
        "init": made.init,
        "epochs": fit_options.epochs,
        "lr": fit_options.lr,
        "batch_size": fit_options.batch_size,
        "weight_decay": fit_options.weight_decay,
        "warmup": fit_options.warmup,
        "patience": fit_options.patience,
    }
    detail: dict[str, Any] = {
        "teacher": context.teacher_detail,
        "init": {"from": made.init, "notes": made.notes, "no_published_weights": made.no_hub},
        "training": result.detail(),
        "rows": {"labelled": int((train.labels >= 0).sum()), "unlabelled": int((train.labels < 0).sum())},
    }
    warnings: list[Warning_] = []
    if first_weights is not None:
        detail["control"], warnings = _control(context, student, first_weights, train, fit_options)
    return Applied(
        student, Method(name=options.methods[0], params=params, detail=detail, layers=[]), warnings=warnings
    )


def default_rate(hidden: int, init: str) -> float:
    """Peak learning rate of AdamW by the student's width; trained weights want a gentler one."""
    rate = 1e-3 if hidden <= 128 else 5e-4 if hidden <= 256 else 2e-4 if hidden <= 512 else 1e-4
    return rate / 2 if init in ("hub", "checkpoint") else rate


def teacher_epochs(rows: int, labels: int, batch_size: int) -> int:
    """Epochs that give a fine-tuned teacher enough steps: 180, and 10 more for every label.

    Two labels and 7,000 rows make one epoch, 150 labels and 15,000 rows four; never more than ten.
    """
    steps = 180 + 10 * labels
    return min(10, max(1, round(steps * batch_size / rows)))


def _options(context: Context) -> DistillOptions:
    options = context.request.options
    assert isinstance(options, DistillOptions)
    return options


def _student(context: Context) -> students.Student:
    options, teacher = _options(context), context.checkpoint
    offline = context.request.common.offline

    def published(name: str) -> Path:
        if teacher.model_type != "bert":
            raise UnavailableError(f"the published miniatures are BERT, the teacher is {teacher.model_type}")
        return references.resolve_student(name, offline=offline).path

    made = students.build(
        options.student,
        teacher,
        teacher.labels,
        STUDENT_PRESETS,
        init=options.init,
        seed=context.seed,
        hub=published,
        resolve=lambda name: references.resolve(name, offline=offline).path,
    )
    made.checkpoint.model.to(context.device)
    return made


def _fit(
    context: Context, student: Checkpoint, train: Encoded, loss: Any, options: FitOptions, title: str
) -> FitResult:
    identity = {
        "training": title,
        "teacher": checkpoints.weights_digest(context.checkpoint.path),
        "options": str(context.request.options),
        "settings": dict(context.request.common.settings),
        "seed": context.seed,
        "train": text.fingerprint(train),
        "validation": text.fingerprint(context.encoded["validation"]),
    }
    return fit(
        student.model,
        train,
        context.encoded["validation"],
        loss,
        options,
        pad_id=student.pad_id,
        device=context.device,
        progress=context.progress,
        title=f"training the {title}",
        resume=ResumePoint(context.resume_dir / title, identity),
        resuming=context.request.common.resume,
    )


def _control(
    context: Context, student: Checkpoint, weights: dict[str, Tensor], train: Encoded, options: FitOptions
) -> tuple[dict[str, Any], list[Warning_]]:
    """The same student from the same weights on the same labelled rows, without the teacher."""
    assert train.labels is not None
    control = copy.copy(student)
    control.model = copy.deepcopy(student.model)
    control.model.load_state_dict(weights)
    labelled = train.take(np.flatnonzero(train.labels >= 0))
    assert labelled.labels is not None
    result = _fit(
        context, control, labelled, cross_entropy(labelled.labels, context.device), options, "control"
    )
    found: dict[str, Any] = {"training": result.detail()}
    split = "test" if "test" in context.encoded else "validation"
    for name, model in (("accuracy", control), ("student_accuracy", student)):
        rows = context.encoded[split]
        found[name], _ = evaluate(model.model, rows, inference(rows, 128, student.pad_id), context.device)
    found["split"] = split
    gain = found["student_accuracy"] - found["accuracy"]
    context.progress.note(
        f"{split} accuracy: {found['student_accuracy']:.1%} distilled, {found['accuracy']:.1%} without the teacher"
    )
    if gain > 0:
        return found, []
    text_ = (
        f"the teacher did not help: without it the student reaches {found['accuracy']:.1%} ({-gain:.1%} more)"
    )
    return found, [Warning_(code="no-gain", message=text_)]


def _budget(train: Encoded, labels: int, seed: int) -> Encoded:
    """Keep the labels of ``labels`` rows, as evenly over the classes as they come; hide the others."""
    assert train.labels is not None
    classes = np.unique(train.labels)
    if not len(classes) <= labels <= len(train):
        raise UsageError(
            f"--labels {labels} is out of range: from {len(classes)}, one a label, to {len(train)}, all rows"
        )
    shuffled = np.random.default_rng(seed).permutation(len(train))
    # Rank of every row within its class, in shuffled order: taking the lowest ranks takes the classes evenly.
    by_class = shuffled[np.argsort(train.labels[shuffled], kind="stable")]
    sizes = np.bincount(train.labels)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.arange(len(train)) - starts
    kept = by_class[np.argsort(rank, kind="stable")[:labels]]
    hidden = np.full(len(train), UNLABELLED, dtype=np.int64)
    hidden[kept] = train.labels[kept]
    return Encoded(train.ids, train.type_ids, train.offsets, hidden)
