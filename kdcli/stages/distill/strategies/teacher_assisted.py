"""Teacher-assisted: one student, one teacher or several, whose probabilities are averaged."""

from __future__ import annotations

import copy
from typing import Any

from kdcli.context import Applied, Context
from kdcli.report.schema import Method, Warning_
from kdcli.stages.distill import control, lesson
from kdcli.stages.distill import student as students
from kdcli.stages.distill.plan import DistillPlan
from kdcli.stages.distill.prepared import Prepared


def run(context: Context, prepared: Prepared) -> Applied:
    """Train the student; with ``--control`` train it again without the teacher."""
    plan = prepared.plan
    texts = students.rows_of(context, plan, context.checkpoint)
    made = students.make(context, plan, context.checkpoint, plan.options.student)
    first_weights = copy.deepcopy(made.checkpoint.model.state_dict()) if plan.options.control else None
    taught = lesson.teach(context, plan, made, prepared.teachers, texts.rows)
    warnings: list[Warning_] = list(taught.warnings)
    detail = students.describe(context, prepared.detail, taught, texts.rows)
    if first_weights is not None:
        detail["control"], more = control.control(context, taught, first_weights, texts)
        warnings += more
    return Applied(taught.checkpoint, method_of(plan, taught, detail), warnings=warnings)


def method_of(plan: DistillPlan, taught: students.Taught, detail: dict[str, Any]) -> Method:
    """The report's account of what was done."""
    return Method(
        name=" + ".join(plan.options.methods), params=students.params(plan, taught), detail=detail, layers=[]
    )
