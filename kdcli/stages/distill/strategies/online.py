"""Online: nobody is fixed.

``--set online=peers``: K students of the same size and different first weights learn from the labels and from each
other (Zhang et al. 2018, "Deep Mutual Learning", arXiv:1706.00384, eq. 8 to 10); the one with the best validation
score is the result. For student k, with p_j the other students' probabilities at the same step, no gradient
through them:

    L_k = (1 - alpha) * CE(y, p_k) + alpha * T^2 / (K - 1) * sum_j KL(p_j || p_k)

Differs: the paper weighs both parts with 1 and has T = 1; alpha = 0.5 is the same up to a factor.

``--set online=teacher``: the teacher is trained on the labels while the student learns from the labels and from
the teacher's answers of the same step. The teacher as it is afterwards is what the student is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcli.context import Applied, Context
from kdcli.measure import measurement
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.students import Student
from kdcli.report import metrics
from kdcli.stages.distill import control, fitting
from kdcli.stages.distill import student as students
from kdcli.stages.distill.plan import DistillPlan
from kdcli.stages.distill.prepared import Prepared
from kdcli.stages.distill.strategies import succession, teacher_assisted
from kdcli.stages.distill.student import Taught
from kdcli.tasks.task import Task
from kdcli.training import number_head
from kdcli.training.label_loss import hard
from kdcli.training.loop import Batch
from kdcli.training.losses import response
from kdcli.training.side_by_side import Outputs, Together

TEACHER_RATE = 1e-4  # of a teacher that trains along, for an encoder of up to 384 features


def together(context: Context, plan: DistillPlan) -> tuple[Taught, dict[str, Any]]:
    """Train teacher and student together, before the teacher is measured.

    Returns:
        The student, and how the teacher got its head, for the report.
    """
    teacher = context.checkpoint
    made = students.make(context, plan, teacher, plan.options.student)
    rows = context.encoded["train"]
    options = fitting.fit_options(context, plan, made, rows)
    rate, task = plan.settings.teacher_lr or TEACHER_RATE, teacher.task
    both = Together([made.checkpoint.model, teacher.model], [0], [1.0, rate / options.lr], task)
    assert rows.labels is not None
    if not teacher.has_head:
        number_head.start(teacher, rows.labels)
    unit = number_head.deviation(task, rows.labels)
    labels = number_head.without_unit(torch.from_numpy(rows.labels).to(context.device), unit)
    alpha, soft = 1 - plan.hard_weight, plan.chosen[0]

    def loss(output: Outputs, batch: Batch) -> Tensor:
        targets = labels[torch.from_numpy(batch.rows).to(context.device)]
        own, theirs = (number_head.without_unit(logits, unit) for logits in output.every)
        value = hard(task, theirs, targets) + (1 - alpha) * hard(task, own, targets)
        return value + alpha * response.loss(own, theirs.detach(), soft.config, task)

    result = fitting.run_fit(context, teacher, rows, loss, options, "student and teacher", model=both)
    teacher.has_head = True
    teacher.task = measurement.decided(teacher, context.encoded["validation"], context.progress)
    context.checkpoint = succession.keep(context, teacher, "teacher")
    detail = {"fine_tuned": True, "together_with_the_student": True, "lr": rate}
    return _taught(made, options, result, {"online": "teacher"}), detail


def run(context: Context, prepared: Prepared) -> Applied:
    """Train the peers, or hand out the student that was trained with its teacher."""
    plan = prepared.plan
    rows = context.encoded["train"]
    taught = prepared.taught or _peers(context, plan)
    detail = students.describe(context, prepared.detail, taught, rows)
    return Applied(taught.checkpoint, teacher_assisted.method_of(plan, taught, detail))


def _peers(context: Context, plan: DistillPlan) -> Taught:
    rows = context.encoded["train"]
    made = [
        students.make(context, plan, context.checkpoint, plan.options.student, seed=context.seed + number)
        for number in range(plan.settings.peers)
    ]
    options = fitting.fit_options(context, plan, made[0], rows)
    models, task = [one.checkpoint.model for one in made], context.checkpoint.task
    peers = Together(models, list(range(len(models))), [1.0] * len(models), task)
    assert rows.labels is not None
    unit = number_head.deviation(task, rows.labels)
    labels = number_head.without_unit(torch.from_numpy(rows.labels).to(context.device), unit)
    alpha, soft = 1 - plan.hard_weight, plan.chosen[0]

    def loss(output: Outputs, batch: Batch) -> Tensor:
        targets = labels[torch.from_numpy(batch.rows).to(context.device)]
        every = [number_head.without_unit(logits, unit) for logits in output.every]
        return mutual(task, every, targets, alpha, lambda s, t: response.loss(s, t, soft.config, task))

    result = fitting.run_fit(context, made[0].checkpoint, rows, loss, options, "peers", model=peers)
    scores = [_validation(context, one.checkpoint) for one in made]
    best = scores.index(max(scores))
    reached = [metrics.of(task.primary).of_score(score) for score in scores]
    context.progress.note(
        f"peers on validation, {task.primary}: "
        + ", ".join(f"{a:.4g}" for a in reached)
        + f"; number {best + 1} is kept"
    )
    return _taught(made[best], options, result, {"online": "peers", "peers": reached, "kept": best + 1})


def mutual(task: Task, every: list[Tensor], targets: Tensor, alpha: float, soft: Any) -> Tensor:
    """Sum over the students of their losses against the labels and against the other students.

    Args:
        task: What a label is.
        every: Logits (B, C) of each of K students.
        targets: Labels of B rows.
        alpha: Weight of the others' answers.
        soft: (student logits, teacher logits) -> scalar, already times T^2.
    """
    value = every[0].new_zeros(())
    for k, own in enumerate(every):
        others = [soft(own, other.detach()) for j, other in enumerate(every) if j != k]
        value = value + (1 - alpha) * hard(task, own, targets) + alpha * torch.stack(others).mean()
    return value


def _validation(context: Context, model: Checkpoint) -> float:
    return control.score(context, model, "validation")


def _taught(made: Student, options: Any, result: Any, detail: dict[str, Any]) -> Taught:
    made.checkpoint.model.eval()
    return Taught(made, options, result, {"training": result.detail(), **detail}, result.steps)
