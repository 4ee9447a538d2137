"""Which of many possible ranks a search looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 56


def spread(costs: Sequence[int] | np.ndarray) -> list[int]:
    """Choose about :data:`STEPS` of the given steps so that any cost has one just below it.

    Args:
        costs: Rising.

    Returns:
        Rising indices, the first and the last among them: half of them in even distances of the cost and half in
        even ratios, because among cheap steps a small difference is a large share.
    """
    if len(costs) == 0:
        return []
    low, high = costs[0], costs[-1]
    targets = np.concatenate([np.linspace(low, high, STEPS // 2), np.geomspace(low, high, STEPS // 2)])
    # A hair more, so that rounding does not lose the ends.
    return sorted(set((np.searchsorted(costs, targets * (1 + 1e-9), side="right") - 1).clip(0).tolist()))
