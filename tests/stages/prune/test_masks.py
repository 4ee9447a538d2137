"""Masks against plain numpy, and in exact numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.prune.criterion import Pattern
from kdcli.stages.prune.masks import keep, n_of_m, rows


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 5), (7, 8)])
@pytest.mark.parametrize("width", [40, 43])
def test_n_of_m_is_the_same_as_sorting_every_block(n: int, m: int, width: int) -> None:
    given = scores(6, width)
    found = n_of_m(given, n, m).numpy()
    for row, kept in zip(given.numpy(), found, strict=True):
        for start in range(0, width // m * m, m):
            best = start + np.argsort(-row[start : start + m])[:n]
            assert set(np.flatnonzero(kept[start : start + m]) + start) == set(best)
        assert kept[width // m * m :].all()


def test_rows_lose_the_same_number() -> None:
    given = scores(7, 33)
    found = rows(given, 12).numpy()
    for row, kept in zip(given.numpy(), found, strict=True):
        assert set(np.flatnonzero(~kept)) == set(np.argsort(row)[:12])


def test_ties_go_in_their_order() -> None:
    level = torch.zeros(2, 8)
    assert rows(level, 3)[1].tolist() == [False] * 3 + [True] * 5
    assert n_of_m(level, 1, 4)[0].tolist() == [False, False, False, True] * 2


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4)])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_what_is_zero_already_goes_first_whatever_its_score(scope, pattern: Pattern) -> None:
    weight = torch.ones(4, 8)
    weight[:, ::4] = 0.0
    given = torch.where(weight == 0, 100.0, scores(4, 8).abs())
    found = keep({"a": given}, {"a": weight}, pattern, scope)["a"]
    assert not found[weight == 0].any()
    assert int((~found).sum()) == 16


@pytest.mark.parametrize(("scope", "parts"), [("global", None), ("layer", [20, 42]), ("row", [20, 42])])
def test_shares_are_taken_over_what_the_scope_says(scope, parts) -> None:
    given = {"a": scores(5, 10) - 10, "b": scores(6, 14, seed=1)}
    weights = {name: torch.ones_like(s) for name, s in given.items()}
    lost = {
        "global": 0.4 * (50 + 84),
        "layer": 0.4 * 50 + 0.4 * 84,
        "row": 5 * round(0.4 * 10) + 6 * round(0.4 * 14),
    }
    found = keep(given, weights, Pattern(0.4), scope)
    assert sum(int((~kept).sum()) for kept in found.values()) == round(lost[scope])
    # The scores of "a" are all lower: only the global scope empties it.
    assert (not found["a"].any()) == (scope == "global")
