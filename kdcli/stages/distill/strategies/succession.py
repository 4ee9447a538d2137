"""Chains: every model is the teacher of the next one.

``assistant-chain`` puts students of middling size between teacher and student (Mirzadeh et al. 2020, "Improved
Knowledge Distillation via Teacher Assistant", arXiv:1902.03393). ``self`` lets a student teach its own successor
of the same size (Furlanello et al. 2018, "Born-Again Neural Networks", arXiv:1805.04770); of its generations the
one with the best validation score is the result, not their ensemble; and a successor starts from its predecessor's
weights, as every student does from its teacher's where the sizes agree, unless ``--init random`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdcli import processes
from kdcli.context import Applied, Context
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.report import metrics
from kdcli.stages.distill import control, lesson
from kdcli.stages.distill import student as students
from kdcli.stages.distill.plan import DistillPlan, assistants
from kdcli.stages.distill.prepared import Prepared
from kdcli.stages.distill.strategies import teacher_assisted
from kdcli.stages.distill.student import Taught
from kdcli.training import distributed


def run(context: Context, prepared: Prepared) -> Applied:
    """Train one model after the other; the report has the score of each."""
    plan = prepared.plan
    own = plan.options.strategy == "self"
    names = (
        [plan.options.student] * plan.settings.generations
        if own
        else [*assistants(plan.settings), plan.options.student]
    )
    texts = students.rows_of(context, plan, context.checkpoint)
    first_weights = _before_any(context, plan) if plan.options.control else None
    taught_by: Sequence[Checkpoint] = prepared.teachers
    table: list[dict[str, Any]] = []
    metric = metrics.of(context.checkpoint.task.primary)
    best: Taught | None = None
    steps = best_steps = 0  # that went into the weights of the last one, and of the best one
    for number, name in enumerate(names, start=1):
        last = number == len(names)
        made = students.make(context, plan, taught_by[0], name)
        title = "student" if last else f"generation {number}" if own else f"assistant {name}"
        context.progress.note(f"{title}: taught by {_name(taught_by, table)}")
        taught = lesson.teach(context, plan, made, taught_by, texts.rows, title=title)
        # A successor goes on from its predecessor's weights where it has them from its teacher.
        steps = taught.steps + (steps if own and made.init == "teacher" else 0)
        table.append(
            {
                "student": name,
                "taught_by": _name(taught_by, table),
                "parameters": sum(p.numel() for p in made.checkpoint.model.parameters()),
                f"validation_{metric.name}": metric.of_score(taught.result.best_score),
            }
        )
        if best is None or not own or taught.result.best_score > best.result.best_score:
            best, best_steps = taught, steps
        if not last:
            taught_by = [keep(context, taught.checkpoint, title)]
    assert best is not None
    detail = students.describe(context, prepared.detail, best, texts.rows) | {"chain": table}
    warnings = list(best.warnings)
    if first_weights is not None:
        detail["control"], more = control.control(context, best, first_weights, texts, steps=best_steps)
        warnings += more
    applied = Applied(best.checkpoint, teacher_assisted.method_of(plan, best, detail), warnings=warnings)
    applied.method.layers = []
    return applied


def _before_any(context: Context, plan: DistillPlan) -> dict[str, Tensor]:
    """The weights that the student has before anything was distilled: those a plain distillation starts from."""
    made = students.make(context, plan, context.checkpoint, plan.options.student)
    return made.checkpoint.model.state_dict()


def keep(context: Context, model: Checkpoint, title: str) -> Checkpoint:
    """Write a model beside the resume points, so that it can teach like any other: from disk."""
    place = context.resume_dir / f"model-{title.replace(' ', '-')}"
    if processes.first():
        place.mkdir(parents=True, exist_ok=True)
    with distributed.first_then_others():
        if processes.first():
            checkpoints.save(model, place)
    return checkpoints.load(place, device=context.device)


def _name(taught_by: Sequence[Checkpoint], table: list[dict[str, Any]]) -> str:
    return (
        "the teacher"
        if not table and len(taught_by) == 1
        else "the teachers"
        if not table
        else table[-1]["student"]
    )
