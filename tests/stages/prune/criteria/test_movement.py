"""Movement pruning against autograd and numpy; its training is in the stage's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.prune.criteria import movement
from kdcli.stages.prune.criteria.movement import Config
from kdcli.stages.prune.criterion import Pattern


def test_gradients_are_those_of_a_mask_of_real_numbers() -> None:
    """Straight-through: the scores get what a factor on every weight would get, the weights what is not masked."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.zeros(35, dtype=torch.float64, requires_grad=True)
    x = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 7, generator=generator) > 0.4
    factor = mask.double().requires_grad_()

    def loss(used: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ used.T).square().sum()

    value = loss(movement.masked(weight, scores, mask))
    found = torch.autograd.grad(value, [weight, scores])
    expected = torch.autograd.grad(loss(weight * factor), [weight, factor])
    assert value == loss(weight * mask)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].flatten())
    assert found[1].view(5, 7)[~mask].abs().min() > 0  # what went can come back


def test_a_score_rises_when_its_weight_moves_away_from_zero() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]], requires_grad=True)
    scores = torch.zeros(4, requires_grad=True)
    target = torch.tensor([[2.0, -2.0, 0.1, -0.1]])  # the first two want to grow, the others to shrink
    used = movement.masked(weight, scores, torch.ones(1, 4, dtype=torch.bool))
    (used - target).square().sum().backward()
    with torch.no_grad():
        scores -= 0.1 * scores.grad
        kept = movement.kept({"w": weight}, {"w": scores}, Pattern(0.5), Config())["w"]
    assert kept.tolist() == [[True, True, False, False]]
    assert torch.sign(scores).tolist() == [1, 1, -1, -1]


def test_the_share_rises_along_the_cubic_schedule() -> None:
    config = Config(warmup=0.2, cooldown=0.3)
    at = np.linspace(0, 1, 101)
    found = [movement.pattern_at(t, Pattern(0.9), 0.1, config).sparsity for t in at]
    expected = [0.1] * 20 + [0.9 + (0.1 - 0.9) * (1 - (t - 0.2) / 0.5) ** 3 for t in at[20:70]] + [0.9] * 31
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_m_goes_one_neighbour_after_the_other(n: int, m: int) -> None:
    found = [movement.pattern_at(t, Pattern(1 - n / m, n, m), 0.0, Config()) for t in np.linspace(0, 1, 201)]
    left = [one.n for one in found]
    assert left == sorted(left, reverse=True)
    assert sorted(set(left)) == list(range(n, m + 1))
    assert all(one.sparsity == pytest.approx(1 - one.n / m) for one in found)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_highest_scores_stay_in_exact_numbers(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.ones(4, 6), "b": torch.ones(3, 10)}
    weights["a"][0, 0] = 0.0
    scores = {name: torch.randn(w.numel(), generator=generator) for name, w in weights.items()}
    scores["a"][0] = 9.0  # of a weight that is zero already
    found = movement.kept(weights, scores, Pattern(0.5), Config(scope=scope))
    assert not found["a"][0, 0]
    flat = {name: kept.flatten() for name, kept in found.items()}
    if scope == "layer":
        assert [int((~kept).sum()) for kept in flat.values()] == [12, 15]
        assert scores["b"][flat["b"]].min() > scores["b"][~flat["b"]].max()
    else:
        whole, stays = torch.cat(list(scores.values()))[1:], torch.cat(list(flat.values()))[1:]
        assert int((~stays).sum()) == 26
        assert whole[stays].min() > whole[~stays].max()


def test_magnitude_does_not_see_what_movement_sees() -> None:
    """The paper's figure: a large weight that shrinks goes, a small one that grows stays."""
    weights, scores = {"w": torch.tensor([[2.0, 0.2]])}, {"w": torch.tensor([-1.0, 1.0])}
    assert movement.kept(weights, scores, Pattern(0.5), Config())["w"].tolist() == [[False, True]]


def test_untrained_scores_prune_by_magnitude_and_a_bias_of_zero_knows_nothing() -> None:
    weight = torch.tensor([[0.1, -4.0, 0.5], [-0.2, 3.0, -0.4]])
    scores = movement.first_scores(weight, movement.Config())
    assert scores.mean() == pytest.approx(1.0)
    pattern, config = Pattern(0.5), movement.Config()
    found = movement.kept({"a": weight}, {"a": scores}, pattern, config)["a"]
    assert torch.equal(found, weight.abs() > 0.45)
    assert not movement.first_scores(weight, movement.Config(bias=0)).any()
    assert not movement.first_scores(torch.zeros(2, 3), config).any()
