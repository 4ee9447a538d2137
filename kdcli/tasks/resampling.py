"""Intervals and comparisons of metrics that have no formula for them: rows drawn again, with replacement.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 (standard error), 13 (percentile
interval) and 16.4 (tests).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DRAWS = 1000
_SEED = 0  # the same rows are drawn for every model, so that two models are compared on the same ones


def drawn(metric: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """The metric of :data:`DRAWS` samples of n of the n rows: (DRAWS,).

    Args:
        metric: Of rows by their numbers (n,), some of them several times.
        n: Number of rows.
    """
    generator = np.random.default_rng(_SEED)
    return np.array([metric(generator.integers(0, n, n)) for _ in range(DRAWS)])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of drawn values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided p-value that a difference is 0, from drawn differences (D,); at least 2 / (D + 1)."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))
