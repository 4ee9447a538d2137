"""F1 of decisions about labels, as functions of sums over rows."""

from __future__ import annotations

import numpy as np

from kdcli.tasks.intervals import Statistic, ratio


def micro_f1_statistic(answers: np.ndarray, truth: np.ndarray) -> Statistic:
    """F1 of all N C decisions, (N, C) bool each; 0 where no label is given nor answered."""
    given = answers.sum(1) + truth.sum(1)
    return Statistic(
        np.stack([2 * (answers & truth).sum(1), given], 1).astype(float), lambda s: ratio(s[:, 0], s[:, 1])
    )


def macro_f1_statistic(answers: np.ndarray, truth: np.ndarray) -> Statistic:
    """Mean F1 of the labels that occur among truth or answers, (N, C) bool each; 0 where there are none."""
    labels = truth.shape[1]

    def of(s: np.ndarray) -> np.ndarray:
        right, given = s[:, :labels], s[:, labels:]
        return ratio(ratio(right, given).sum(1), (given > 0).sum(1))

    return Statistic(np.concatenate([2.0 * (answers & truth), answers + 1.0 * truth], 1), of)
