"""What a distillation was asked to do, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kdcli import processes, registry
from kdcli.errors import UsageError
from kdcli.models import students
from kdcli.request import Request
from kdcli.stages.distill.options import STUDENT_PRESETS, DistillOptions
from kdcli.tasks.task import Task
from kdcli.training import objective
from kdcli.training.objective import ChosenLoss
from kdcli.training.terms import Loss

ALPHA = 0.5


class DistillSettings(BaseModel):
    """What ``--set`` may say about a distillation besides the methods' own parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs of fine-tuning a teacher that has no head; by default from rows and labels",
    )
    teacher_lr: float | None = Field(None, gt=0, description="its peak learning rate")
    teacher_batch_size: int = Field(32, ge=1, description="its batch size in rows")
    teacher_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GiB that the teacher may take of each device and of memory; the rest of it stays on disk",
    )
    teacher_weights: str | None = Field(
        None,
        description="several teachers: weights of their probabilities, such as 0.7,0.3; equal by default",
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation before the student stops; none by default"
    )
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, on matrices")
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="of the student while it trains; by default 0, for static, cnn, bilstm 0.2",
    )
    augment_seed: int = Field(
        0, ge=0, description="of the extra texts; not --seed, so that runs share the teacher's outputs"
    )
    phases: Literal["auto", "one", "two"] = Field(
        "auto", description="two: match the teacher's pooled vector first; auto: when a trial says so"
    )
    feature_cache_gib: float = Field(
        4.0, ge=0, description="GiB of disk for the teacher's hidden states; above it they are computed again"
    )
    peers: int = Field(2, ge=2, le=8, description="online: students that learn from each other")
    online: Literal["peers", "teacher"] = Field(
        "peers", description="online: equal peers, or a teacher that trains together with its student"
    )
    assistants: str = Field(
        "mini", description="assistant-chain: students between teacher and student, such as small,mini"
    )
    generations: int = Field(2, ge=2, le=10, description="self: how often the student teaches its successor")
    layer_epochs: int = Field(
        2, ge=1, description="layerwise: epochs of fine-tuning each layer of the teacher"
    )
    distill_ensemble: bool = Field(
        False, description="layerwise: distil the ensemble into one student at the end"
    )


@dataclass(frozen=True)
class DistillPlan:
    """A checked request."""

    options: DistillOptions
    settings: DistillSettings
    chosen: Sequence[ChosenLoss]
    hard_weight: float  # of the labels


def check(request: Request) -> DistillPlan:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UsageError: An unknown name, a value out of range, or a combination that means nothing.
    """
    options = request.options_as(DistillOptions)
    students.size_of(options.student, STUDENT_PRESETS)
    alpha = ALPHA if options.alpha is None else options.alpha
    names = options.methods
    if len(set(names)) != len(names):
        raise UsageError(f"a method is given twice: {', '.join(names)}")
    methods = {name: registry.load("distill", name, Loss) for name in names}
    if processes.count() > 1 and any(m.kind == "adversarial" for m in methods.values()):
        raise UsageError("the adversarial method trains in one process only: its discriminator is not shared")
    settings, configs = _settings(request, methods)
    if options.strategy in ("online", "layerwise") and tuple(names) != ("response",):
        raise UsageError(
            f"strategy '{options.strategy}' compares answers only",
            "leave --method out, or use another strategy",
        )
    if options.strategy == "online" and options.augment:
        raise UsageError(
            "strategy 'online' learns from the training rows alone: its teacher changes, so it labels no extra texts",
            "leave --augment out, or use another strategy",
        )
    if len(options.teachers) > 1 and options.strategy in ("online", "layerwise"):
        raise UsageError(f"strategy '{options.strategy}' has one teacher; give --teacher once")
    if options.control and options.strategy in ("online", "layerwise"):
        raise UsageError(
            f"strategy '{options.strategy}' has no --control", "leave --control out, or use another strategy"
        )
    if options.strategy == "assistant-chain":
        assistants(settings)
    if options.alpha is not None and all(m.kind != "response" for m in methods.values()):
        raise UsageError(
            "--alpha weighs response methods, and none was chosen",
            "add --method response, or leave --alpha out",
        )
    hard, weights = objective.weights(
        names, methods, alpha=alpha, beta=options.beta, gamma=options.gamma, given=options.weights
    )
    chosen = [ChosenLoss(name, methods[name], configs[name], weights[name]) for name in names]
    teacher_weights(settings, len(options.teachers))
    return DistillPlan(options, settings, chosen, hard)


def need_task(plan: DistillPlan, task: Task) -> None:
    """Refuse methods and a strategy that cannot work with the answers of a task.

    Raises:
        UsageError: Says which, why, and what to use.
    """
    registry.need_answers({one.name: one.method for one in plan.chosen}, task)
    if plan.options.strategy == "layerwise" and task.kind != "one-of":
        raise UsageError(
            f"strategy 'layerwise' mixes probabilities of classes, and the task is {task.name}",
            "use --strategy teacher-assisted",
        )


def assistants(settings: DistillSettings) -> list[str]:
    """Names of the assistants, largest first.

    Raises:
        UsageError: There is none, or one of a size that makes no model.
    """
    names = [name.strip() for name in settings.assistants.split(",") if name.strip()]
    if not names:
        raise UsageError("--set assistants= names no assistant", "such as --set assistants=small,mini")
    for name in names:
        students.size_of(name, STUDENT_PRESETS)
    return names


def teacher_weights(settings: DistillSettings, teachers: int) -> list[float]:
    """The weight of every teacher, summing to 1.

    Raises:
        UsageError: Not as many positive numbers as teachers.
    """
    if settings.teacher_weights is None:
        return [1 / teachers] * teachers
    try:
        found = [float(part) for part in settings.teacher_weights.split(",")]
    except ValueError:
        found = []
    if len(found) != teachers or min(found) <= 0 or not sum(found) < float("inf"):
        raise UsageError(
            f"--set teacher_weights={settings.teacher_weights}: {teachers} positive numbers are needed, "
            "one a --teacher, with commas between"
        )
    return [value / sum(found) for value in found]


def _settings(request: Request, methods: Mapping[str, Loss]) -> tuple[DistillSettings, dict[str, Any]]:
    """The distillation's own settings and those of the methods; ``--temperature`` is one of the latter."""
    options = request.options_as(DistillOptions)
    given = dict(request.common.settings)
    if options.temperature is not None:
        holders = [name for name, m in methods.items() if "temperature" in m.settings]
        if not holders:
            raise UsageError(f"--temperature belongs to none of the methods {', '.join(methods)}")
        given.setdefault("temperature", str(options.temperature))
    own, by_method = registry.share_out("distill", given, methods, DistillSettings)
    configs = {name: method.configured(by_method[name]) for name, method in methods.items()}
    return registry.parse_config(DistillSettings, own), configs


def teacher_epochs(task: Task, rows: int, labels: int, batch_size: int) -> int:
    """Epochs that give a fine-tuned teacher about the steps that its task takes: one to ten."""
    return min(10, max(1, round(task.teaching_steps(labels) * batch_size / rows)))
