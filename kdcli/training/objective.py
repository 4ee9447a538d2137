"""The loss of a distillation: labels and any number of terms, each one method with its weight.

L = (1 - alpha) * L_labels + alpha * L_response + beta * L_feature + gamma * L_relation + sum(weight_i * L_i)

Labels and answers that are numbers are divided by the labels' standard deviation: :mod:`kdcli.training.number_head`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task
from kdcli.training import number_head
from kdcli.training.capture import Capture
from kdcli.training.features import TeacherSignals
from kdcli.training.label_loss import hard
from kdcli.training.loop import Batch
from kdcli.training.terms import Loss, LossSetting, Needs, Shape, Step


@dataclass(frozen=True)
class ChosenLoss:
    """A method that the user chose, with its parameters and its weight in the sum."""

    name: str
    method: Loss
    config: Any
    weight: float


@dataclass(frozen=True)
class Term:
    """A chosen method, bound to a student and a teacher."""

    chosen: ChosenLoss
    setting: LossSetting


def bind(
    chosen: Sequence[ChosenLoss],
    student: Shape,
    teacher: Shape,
    pairs: Sequence[tuple[int, int]],
    seed: int,
    device: torch.device,
) -> tuple[list[Term], list[str]]:
    """Bind methods to the sizes of two models; projections get their first weights from ``seed``.

    Returns:
        The terms, and a sentence for each of them that fell back to something else.

    Raises:
        UsageError: A method means nothing for these two models.
    """
    terms, notes = [], []
    for number, one in enumerate(chosen):
        setting = LossSetting(one.config, student, teacher, pairs)
        note = one.method.check(setting)
        if note:
            notes.append(note)
        torch.manual_seed(seed + 1 + number)
        trained = one.method.trained(setting)
        terms.append(Term(one, replace(setting, trained=None if trained is None else trained.to(device))))
    return terms, notes


def needs(terms: Sequence[Term]) -> tuple[Needs, Needs]:
    """What all terms together read of the student and of the teacher."""
    student, teacher = Needs(), Needs()
    for term in terms:
        one, two = term.chosen.method.needs(term.setting)
        student, teacher = student | one, teacher | two
    return student, teacher


class Objective:
    """The loss of one training; ``extra`` holds what is trained along and thrown away.

    Args:
        terms: Bound methods.
        hard_weight: Of the task's loss against the labels, 1 - alpha.
        labels: Of N rows.
        student: Hooks on the student, which is about to run on the same batch.
        teacher: Gives the teacher's signals of any rows.
        device: Of the student.
        task: What a label is.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        hard_weight: float,
        labels: np.ndarray,
        student: Capture,
        teacher: TeacherSignals,
        device: torch.device,
        task: Task = CLASSIFICATION,
    ) -> None:
        self.terms, self.hard_weight, self.task = list(terms), hard_weight, task
        self.student, self.teacher, self.device = student, teacher, device
        self.unit = number_head.deviation(task, labels)
        self.labels = number_head.without_unit(torch.from_numpy(labels).to(device), self.unit)
        self.extra = nn.ModuleDict(
            {
                t.chosen.name.replace("-", "_"): t.setting.trained
                for t in terms
                if t.setting.trained is not None
            }
        )

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The weighted sum, a mean over the rows of the batch; of numbers without their unit."""
        logits = number_head.without_unit(output.logits, self.unit)
        labels = self.labels[torch.from_numpy(batch.rows).to(self.device)]
        value = logits.new_zeros(())
        if self.hard_weight > 0:
            value = value + self.hard_weight * hard(self.task, logits, labels)
        own, theirs = self.student.signals(logits, batch.mask), self.teacher(batch)
        theirs = replace(theirs, logits=number_head.without_unit(theirs.logits, self.unit))
        step = Step(labels, batch.progress, self.task)
        for term in self.terms:
            found = term.chosen.method.term(own, theirs, term.setting, step)
            value = value + term.chosen.weight * found
        return value


def weights(
    names: Sequence[str],
    methods: Mapping[str, Loss],
    *,
    alpha: float,
    beta: float | None,
    gamma: float | None,
    given: Mapping[str, float],
) -> tuple[float, dict[str, float]]:
    """The weight of the labels and of every term.

    The first response method has alpha and the labels 1 - alpha; without a response method the labels have 1.
    ``--weight NAME`` wins over beta and gamma, which win over the method's own default.

    Raises:
        UsageError: A weight for something that was not chosen.
    """
    for name in given:
        if name not in names:
            raise UsageError(f"--weight {name} belongs to no chosen method; chosen: {', '.join(names)}")
    kinds = {name: methods[name].kind for name in names}
    for option, kind, value in (("beta", "feature", beta), ("gamma", "relation", gamma)):
        if value is not None and kind not in kinds.values():
            raise UsageError(
                f"--{option} weighs {kind} methods, and none was chosen", f"add --method, or leave --{option}"
            )
    by_kind = {"feature": beta, "relation": gamma}
    found: dict[str, float] = {}
    response_seen = False
    for name in names:
        value = by_kind.get(kinds[name])
        if kinds[name] == "response" and not response_seen:
            response_seen, value = True, alpha
            if name in given:
                raise UsageError(f"the weight of '{name}' is --alpha; --weight is for the other terms")
        elif name in given:
            value = given[name]
        found[name] = methods[name].weight if value is None else value
    return (1 - alpha if response_seen else 1.0), found
