"""The smallest budget that keeps a score: a bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

JUDGED_ROWS = 2000
"""Validation rows that judge a search, at most."""

_STEPS = 6
_BETWEEN = (0.05, 0.95)


def search(
    attempt: Callable[[float], float | None],
    least: float,
    keep: Callable[[], None],
    metric: str = "accuracy",
) -> list[dict[str, Any]]:
    """Bisect for the smallest budget with at least this score.

    The score is taken as rising with the budget, which noise makes only nearly true; every kept budget was tried.

    Args:
        attempt: Tries a budget and returns the score; None when the budget cannot be met.
        least: The score that has to be reached.
        keep: Called after an attempt that reached it and is the smallest so far.
        metric: What the score is of.

    Returns:
        The attempts, in order: ``budget``, the metric, ``kept``.
    """
    low, high = _BETWEEN
    steps: list[dict[str, Any]] = []
    for number in range(_STEPS):
        budget = high if number == 0 else round((low + high) / 2, 4)
        found = attempt(budget)
        kept = found is not None and found >= least - 1e-12
        steps.append({"budget": budget, metric: found, "kept": kept})
        if kept:
            keep()
            high = budget
        elif number == 0:
            break
        else:
            low = budget
    return steps
