"""A training that blew up, told as that, before anybody exports or measures what is left of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kdcli.errors import InputError
from kdcli.report import metrics
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task
from kdcli.training import number_head

GROWN = 2.0
"""How many times its first value a loss reaches in a training that diverged, at least."""

FEW = 20
"""Steps of a training whose losses, each of them from before its step, may say nothing of what the last ones did."""


@dataclass(frozen=True)
class Divergence:
    """Looks at the losses of one training.

    Args:
        title: What the training is called.
        rate: Its peak learning rate.
        option: The option that sets the rate.
        labels: Of the validation rows.
        task: What they are.
        deviation: Of labels that are numbers, without whose unit the losses are.
    """

    title: str
    rate: float
    option: str
    labels: np.ndarray | None
    task: Task = CLASSIFICATION
    deviation: float = 1.0

    def of_step(self, loss: float, epoch: int, step: int | None = None, *, what: str = "loss") -> None:
        """Stop at a loss that is no number.

        Raises:
            InputError: It is NaN or infinite.
        """
        if not math.isfinite(loss):
            where = f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}"
            raise self._error(f"the {what} became {loss} in {where}")

    def of_result(self, first: float | None, epoch: Mapping[str, float], before: float | None = None) -> None:
        """Stop at a result that is worse than none.

        That is one whose training loss is a > :data:`GROWN` times that of the first step, or its validation loss as
        much more than it was, in a training of :data:`FEW` steps; whose validation loss is
        b > 1 times that of one answer for all rows, with a * b > :data:`GROWN` squared, and whose score is no better
        than that answer's. A model that overfits has a low training loss, one that learns nothing keeps the first
        one, and one that is sure of itself is right oftener.

        Args:
            first: Loss of the first step; None when it is not known.
            epoch: ``epoch``, ``loss``, ``validation_loss`` and ``validation_<metric>`` of the epoch that is kept.
            before: Validation loss before the training, where it is short.

        Raises:
            InputError: It has diverged.
        """
        if first is None or self.labels is None or not len(self.labels):
            return
        blind = self.task.blind(self.labels)
        if blind is None:
            return
        without_unit = self.task.blind(number_head.without_unit(self.labels, self.deviation))
        one_answer = 0.0 if without_unit is None else without_unit.loss
        score = epoch[f"validation_{self.task.primary}"]
        grown, worse = epoch["loss"] / max(first, 1e-12), epoch["validation_loss"] / max(one_answer, 1e-12)
        if before is not None:
            grown = max(grown, epoch["validation_loss"] / max(before, 1e-12))
        if grown > GROWN and worse > 1 and grown * worse > GROWN**2 and score <= blind.score + blind.noise:
            shown = metrics.of(self.task.primary).of_score
            raise self._error(
                f"the loss was {first:.4g} at the first step and {epoch['loss']:.4g} in epoch {epoch['epoch']:.0f}, "
                f"and on validation it is {epoch['validation_loss']:.4g} (one answer for all rows: {one_answer:.4g}) "
                f"at {self.task.primary} {shown(score):.4g} (one answer for all rows: {shown(blind.score):.4g})"
            )

    def _error(self, text: str) -> InputError:
        return InputError(
            f"{self.title} diverged: {text}",
            f"the peak learning rate was {self.rate:g}; give a lower one with {self.option}, or check the data",
        )
