"""The smallest budget that keeps the accuracy: a bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

JUDGED_ROWS = 2000
"""Validation rows that judge a search, at most."""

_STEPS = 6
_BETWEEN = (0.05, 0.95)


def search(
    attempt: Callable[[float], float | None], accuracy: float, keep: Callable[[], None]
) -> list[dict[str, Any]]:
    """Bisect for the smallest budget with at least this accuracy.

    Accuracy is taken as rising with the budget, which noise makes only nearly true; every kept budget was tried.

    Args:
        attempt: Tries a budget and returns the accuracy; None when the budget cannot be met.
        accuracy: What has to be reached.
        keep: Called after an attempt that reached it and is the smallest so far.

    Returns:
        The attempts, in order: ``budget``, ``accuracy``, ``kept``.
    """
    low, high = _BETWEEN
    steps: list[dict[str, Any]] = []
    for number in range(_STEPS):
        budget = high if number == 0 else round((low + high) / 2, 4)
        found = attempt(budget)
        kept = found is not None and found >= accuracy - 1e-12
        steps.append({"budget": budget, "accuracy": found, "kept": kept})
        if kept:
            keep()
            high = budget
        elif number == 0:
            break
        else:
            low = budget
    return steps
