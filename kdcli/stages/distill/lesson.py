"""One lesson: a student, its teachers and their texts, in one phase or two."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from kdcli.context import Context
from kdcli.inputs import sampling
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models import placement, students
from kdcli.models.checkpoint import Checkpoint
from kdcli.report import metrics
from kdcli.stages.distill.fitting import fit_options, run_fit
from kdcli.stages.distill.plan import DistillPlan, teacher_weights
from kdcli.stages.distill.student import Taught
from kdcli.training import features, layer_map, objective
from kdcli.training import teacher as teachers
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import StatesPlace, TeacherSignals
from kdcli.training.first_token import first_token_only
from kdcli.training.loop import FitOptions, FitResult
from kdcli.training.losses import pooled
from kdcli.training.objective import ChosenLoss

FIRST_PHASE = 1 / 3  # of the epochs, when there are two phases
TRIAL_EPOCHS, TRIAL_ROWS = 3, 15_000  # of the trial that decides between one phase and two


def place(context: Context, plan: DistillPlan, teacher: Checkpoint) -> None:
    """Spread a teacher that is larger than the device, or than it may be, over all the places there are."""
    limit = plan.settings.teacher_memory_gib
    if teacher.placed is not None or (limit is None and teacher.device == context.device):
        return
    offload = context.resume_dir / f"offload-{checkpoints.weights_digest(teacher.path)[:8]}"
    bytes_ = None if limit is None else int(limit * 2**30)
    placement.spread(teacher, context.device, offload, bytes_)
    context.progress.note(f"teacher {teacher.notes[-1]}")


def soft_targets(
    context: Context, plan: DistillPlan, taught_by: Sequence[Checkpoint], rows: Encoded
) -> np.ndarray:
    """Logits (N, C) to imitate: the teacher's, or those of several teachers as one."""
    found = []
    for teacher in taught_by:
        own = teacher is context.checkpoint and teacher.placed is None
        graph = context.input_graph if own else None
        logits = teachers.outputs(
            teacher, rows, device=context.device, progress=context.progress, graph=graph
        )
        order = teacher.task.order(context.checkpoint.labels, teacher.labels)
        assert order is not None, "teachers with other labels were refused"
        found.append(logits if order == list(range(len(order))) else np.asarray(logits)[:, order])
    if len(found) == 1:
        return found[0]
    temperature = next(
        (float(c.config.temperature) for c in plan.chosen if "temperature" in c.method.settings), 1.0
    )
    return features.combined(
        found, teacher_weights(plan.settings, len(found)), temperature, context.checkpoint.task
    )


def teach(
    context: Context,
    plan: DistillPlan,
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
        plan: DistillPlan,
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
        self.stored = StatesPlace("not read", 0)
        self.seconds = 0.0  # spent on the teacher

    def answers(self, options: FitOptions, title: str, rows: np.ndarray | None = None) -> FitResult:
        """The training proper: the chosen methods, and the labels."""
        return self._fit(self.plan.chosen, self.plan.hard_weight, options, title, rows)

    def features(self, options: FitOptions, title: str, rows: np.ndarray | None = None) -> FitResult:
        """The first of two phases: match the vector that the teacher's head reads."""
        one = ChosenLoss("pooled", pooled.METHOD, pooled.Config(), 1.0)
        return self._fit([one], 0.0, options, title, rows)

    def trial(self, options: FitOptions, title: str, found: dict[str, Any]) -> bool:
        """Whether two phases beat one on validation: both run shortly, with as many steps, from the same weights."""
        if options.epochs < 2 or not self.shapes[0].pooled or not self.shapes[1].pooled:
            return False
        train = self.context.encoded["train"]  # the first of the rows; augmented ones come after them
        some = sampling.positions(
            sampling.strata(train, self.student.task), len(train), TRIAL_ROWS, self.context.seed
        )
        short = replace(options, epochs=TRIAL_EPOCHS, patience=None)
        weights = copy.deepcopy(self.student.model.state_dict())
        one = self.answers(short, f"{title} trial in one phase", some)
        self.student.model.load_state_dict(weights)
        self.features(replace(short, epochs=1, keep="last"), f"{title} trial features", some)
        two = self.answers(replace(short, epochs=TRIAL_EPOCHS - 1), f"{title} trial in two phases", some)
        self.student.model.load_state_dict(weights)
        better = two.best_score > one.best_score
        metric = metrics.of(self.student.task.primary)
        reached = {"one": metric.of_score(one.best_score), "two": metric.of_score(two.best_score)}
        found["trial"] = reached | {"rows": len(some)}
        self.context.progress.note(
            f"trial on validation, {metric.name}: one phase {reached['one']:.4g}, "
            f"two {reached['two']:.4g}; {'two' if better else 'one'} taken"
        )
        return better

    def _fit(
        self,
        chosen: Sequence[ChosenLoss],
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
            loss = objective.Objective(
                terms, hard_weight, rows.labels, capture, signals, context.device, student.task
            )
            result = run_fit(context, student, rows, loss, options, title, extra=loss.extra)
        return result
