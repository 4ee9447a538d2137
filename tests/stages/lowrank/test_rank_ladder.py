"""The steps that a search looks at."""

from __future__ import annotations

import numpy as np
import pytest

from kdcli.stages.lowrank import rank_ladder


@pytest.mark.parametrize("costs", [[], [5], [5, 7], list(range(1, 40))])
def test_a_short_ladder_loses_little(costs: list[int]) -> None:
    found = rank_ladder.spread(costs)
    assert found == sorted(set(found))
    if costs:
        assert (found[0], found[-1]) == (0, len(costs) - 1)


def test_any_cost_has_a_step_just_below_it() -> None:
    costs = np.cumsum(np.random.default_rng(0).integers(1, 9, size=5000)).tolist()
    found = rank_ladder.spread(costs)
    assert len(found) <= rank_ladder.STEPS
    chosen = np.array(costs)[found]
    steps = np.diff(chosen)
    # Half of the steps are even: none is longer than one of them and one gap between costs.
    assert steps.max() <= (costs[-1] - costs[0]) / (rank_ladder.STEPS // 2 - 1) + 16
    # The other half are even in ratio.
    ratio = (costs[-1] / costs[0]) ** (1 / (rank_ladder.STEPS // 2 - 1))
    assert (chosen[1:] / chosen[:-1]).max() <= ratio + 8 / costs[0]
