"""Sharing a budget of parameters: exact where exactness can be checked by trying everything."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.errors import UsageError
from kdcli.stages.lowrank import rank_budget
from kdcli.stages.lowrank.rank_budget import Choices, LayerSize
from kdcli.tasks.classification import CLASSIFICATION

SIZES = {
    "square": LayerSize(40, 40, 40),
    "wide": LayerSize(60, 30, 60),
    "tall": LayerSize(30, 60, 0),
    "sliver": LayerSize(1, 9, 1),
}


def curve(rng: np.random.Generator, length: int, scale: float) -> np.ndarray:
    """Falling and convex, ending at 0."""
    steps = np.sort(rng.exponential(size=length))[::-1] * scale
    return np.append(np.cumsum(steps[::-1])[::-1], 0.0)


def test_break_even() -> None:
    assert LayerSize(768, 3072, 768).break_even == pytest.approx(614.4)
    square = LayerSize(384, 384, 384)
    assert square.break_even == 192
    assert [square.settle(r) for r in (1, 191, 192, 384)] == [1, 191, None, None]
    assert square.parameters(191) < square.parameters(192) == square.dense == square.parameters(None)
    table = rank_budget.size_of(nn.Embedding(1000, 64))  # whose factors have a bias that it has not
    assert table.parameters(10) == 10 * 1064 + 64
    assert table.dense == 64000
    rank = int(table.break_even)
    assert table.parameters(rank) < table.dense <= table.parameters(rank + 1)


@pytest.mark.parametrize("budget", [0.2, 0.6, 0.95])
def test_shares_stay_within_the_budget(budget: float) -> None:
    rng = np.random.default_rng(0)
    damage = {n: curve(rng, min(s.outputs, s.inputs), 10.0**i) for i, (n, s) in enumerate(SIZES.items())}
    even = rank_budget.even(SIZES, budget)
    weighted = rank_budget.by_damage(SIZES, damage, budget)
    dense = sum(s.dense for s in SIZES.values())
    for ranks in (even, weighted, rank_budget.between(SIZES, even, weighted)):
        assert set(ranks) == set(SIZES)
        assert rank_budget.total(SIZES, ranks) <= budget * dense
        assert all(r is None or 1 <= r < SIZES[n].break_even for n, r in ranks.items())
    assert even["sliver"] is None  # rank 1 would be larger than the row itself
    assert even["square"] == int((budget * 1640 - 40) // 80)

    def harm(ranks):
        return sum(0.0 if r is None else damage[n][r] for n, r in ranks.items())

    assert harm(weighted) <= harm(even)


@pytest.mark.parametrize("seed", range(5))
def test_damage_is_least_among_all_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {name: LayerSize(40, 40, 40) for name in "abc"}
    damage = {name: curve(rng, 40, s) for name, s in zip("abc", (1.0, 2.0, 4.0), strict=True)}
    found = rank_budget.by_damage(sizes, damage, 0.6)
    allowed = 0.6 * 3 * 1640
    options = [*range(8, 20), None]
    best = min(
        sum(0.0 if r is None else damage[n][r] for n, r in zip("abc", ranks, strict=True))
        for ranks in itertools.product(options, repeat=3)
        if rank_budget.total(sizes, dict(zip("abc", ranks, strict=True))) <= allowed
    )
    own = sum(0.0 if r is None else float(damage[n][r]) for n, r in found.items())
    even = sum(float(damage[n][r or 0]) for n, r in rank_budget.even(sizes, 0.6).items())
    # Off the convex hull (a layer that goes dense is one big step) a little may be lost.
    assert best - 1e-9 <= own <= best + 0.1 * (even - best)


def test_a_layer_that_matters_stays_dense_and_one_that_does_not_pays() -> None:
    sizes = {"dear": LayerSize(40, 40, 40), "cheap": LayerSize(40, 40, 40)}
    damage = {"dear": np.linspace(1000, 0, 41), "cheap": np.linspace(1e-6, 0, 41)}
    ranks = rank_budget.by_damage(sizes, damage, 0.75)
    assert ranks["dear"] is None
    assert ranks["cheap"] == (0.75 * 2 * 1640 - 1640 - 40) // 80


def test_an_impossible_budget_names_the_least() -> None:
    with pytest.raises(UsageError, match=r"--budget 0.03 cannot be met: rank 1 .* keeps 7\.32%"):
        rank_budget.even({"a": LayerSize(40, 40, 40)}, 0.03)


def test_between_counts_a_dense_layer_as_break_even() -> None:
    sizes = {name: LayerSize(40, 40, 40) for name in "abc"}
    one, two = {"a": 8, "b": None, "c": 10}, {"a": None, "b": None, "c": 13}
    assert rank_budget.between(sizes, one, two) == {"a": 14, "b": None, "c": 11}


class Classifier(nn.Module):
    """Logits are the first token's outputs, so that the Gauss-Newton matrix is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.fc(x)[:, 0])


def test_divergence() -> None:
    model = Classifier()
    batches = [{"x": torch.randn(n, 2, 5), "attention_mask": torch.ones(n, 2)} for n in (3, 7)]
    dense = [torch.randn(n, 4) for n in (3, 7)]
    p = torch.cat(dense).softmax(-1).double().numpy()
    q = torch.cat([model(**b).logits for b in batches]).softmax(-1).detach().double().numpy()
    expected = (p * np.log(p / q)).sum(1).mean()
    assert rank_budget.divergence(CLASSIFICATION, model, dense, batches) == pytest.approx(expected, rel=1e-5)
    own = [model(**b).logits.detach() for b in batches]
    assert rank_budget.divergence(CLASSIFICATION, model, own, batches) == pytest.approx(0, abs=1e-7)


def test_scaled_goes_through_what_was_measured() -> None:
    predicted = np.array([16.0, 8.0, 4.0, 2.0, 1.0, 0.0])
    twice = rank_budget.scaled(predicted, [2], [8.0])
    np.testing.assert_allclose(twice, 2 * predicted)
    bent = rank_budget.scaled(predicted, [1, 3], [8.0, 32.0])
    np.testing.assert_allclose(bent[[1, 3]], [32.0, 32.0])  # falling: no rank is worse than a lower one
    assert (np.diff(bent) <= 0).all()
    assert bent[-1] == 0


def test_least_under_any_cost() -> None:
    """Milliseconds instead of parameters; the cheapest where nothing fits."""
    choices = {
        "a": Choices([1, 2, None], np.array([0.01, 0.02, 0.03]), np.array([5.0, 1.0, 0.0])),
        "b": Choices([1, 2, None], np.array([0.01, 0.02, 0.03]), np.array([0.5, 0.1, 0.0])),
    }
    assert rank_budget.least(choices, 0.031) == {"a": 1, "b": 0}
    assert rank_budget.least(choices, 1.0) == {"a": 2, "b": 2}
    assert rank_budget.least(choices, 0.001) == {"a": 0, "b": 0}
