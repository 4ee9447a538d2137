"""Whitened factorisation against the textbook solution, written out densely in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.probe.moments import Moments
from kdcli.stages.lowrank import factors
from kdcli.stages.lowrank.rules import svd, whitening
from tests.stages.lowrank.rules import problems
from tests.stages.lowrank.rules.problems import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_textbook_solution(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(500, shape[1])
    found = problems.solved(whitening, layer, x)
    # The textbook: S = chol(C), W S = U D V^T, W' = U_r D_r V_r^T S^-1, b' = b + (W - W') mu.
    weight, data = layer.weight.detach().double().numpy(), x.double().numpy()
    mean = data.mean(0)
    root = np.linalg.cholesky((data - mean).T @ (data - mean) / len(data))
    d = np.linalg.svd(weight @ root, compute_uv=False)
    np.testing.assert_allclose(found.energies, d**2, rtol=1e-5, atol=1e-6 * d[0] ** 2)
    for rank in range(1, min(shape) + 1):
        textbook = problems.truncated(weight @ root, rank) @ np.linalg.inv(root)
        pair = problems.pair_of(layer, found, rank)
        np.testing.assert_allclose(problems.product(pair), textbook, atol=2e-4)
        bias = layer.bias.detach().numpy() + (weight - textbook) @ mean
        np.testing.assert_allclose(pair.bias.detach().numpy(), bias, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropped_squared_singular_values_are_the_calibration_error(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(500, shape[1])
    found = problems.solved(whitening, layer, x)
    everything = float(found.energies.sum())
    for rank in range(1, min(shape) + 1):
        measured = problems.error(layer, problems.pair_of(layer, found, rank), x)
        dropped = float(found.energies[rank:].sum())
        # float32 outputs of order 10, squared and summed
        assert measured == pytest.approx(dropped, rel=1e-4, abs=1e-6 * everything)
        assert found.errors[rank] == pytest.approx(dropped / everything, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 3, 0])
def test_full_rank_changes_nothing_even_off_the_calibration_inputs(
    shape: tuple[int, int], rank: int | None
) -> None:
    layer = problems.layer_of(shape)
    found = problems.solved(whitening, layer, problems.inputs(200, shape[1], rank=rank))
    pair = problems.pair_of(layer, found, min(shape))
    elsewhere = torch.randn(50, shape[1])
    torch.testing.assert_close(pair(elsewhere), layer(elsewhere), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_deficient_inputs_need_no_more_directions_than_they_have(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(300, shape[1], rank=3)
    found = problems.solved(whitening, layer, x)
    assert found.errors[3] < 1e-6 < found.errors[2]
    torch.testing.assert_close(problems.pair_of(layer, found, 3)(x), layer(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constant", [torch.zeros, torch.ones, torch.randn])
def test_constant_inputs_and_a_zero_matrix(shape: tuple[int, int], constant) -> None:
    layer, x = problems.layer_of(shape), constant(1, shape[1]).repeat(60, 1)
    found = problems.solved(whitening, layer, x)
    assert found.energies.sum() < 1e-6
    torch.testing.assert_close(problems.pair_of(layer, found, 1)(x), layer(x), rtol=0, atol=1e-5)
    nn.init.zeros_(layer.weight)
    x = problems.inputs(60, shape[1])
    pair = problems.pair_of(layer, problems.solved(whitening, layer, x), 2)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_zero_rows_and_columns(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    with torch.no_grad():
        layer.weight[3:] = 0
        layer.weight[:, 2] = 0
    found = problems.solved(whitening, layer, x)
    torch.testing.assert_close(problems.pair_of(layer, found, 3)(x), layer(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_never_worse_than_plain_svd(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(500, shape[1])
    ours = problems.solved(whitening, layer, x)
    theirs = problems.solved(svd, layer, x, svd.Config(centred=True))
    gains = [
        problems.error(layer, problems.pair_of(layer, theirs, rank), x)
        / problems.error(layer, problems.pair_of(layer, ours, rank), x)
        for rank in range(1, min(shape))
    ]
    assert min(gains) >= 1
    assert max(gains) > 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_place_for_the_mean_it_is_approximated_too(shape: tuple[int, int], bias: bool) -> None:
    layer, x = problems.layer_of(shape, bias=bias), problems.inputs(500, shape[1])
    data, weight = x.double().numpy(), layer.weight.detach().double().numpy()
    d = np.linalg.svd(weight @ np.linalg.cholesky(data.T @ data / len(data)), compute_uv=False)
    found = problems.solved(whitening, layer, x, whitening.Config(centred=False))
    pair = problems.pair_of(layer, found, 3)
    assert problems.error(layer, pair, x) == pytest.approx(float((d[3:] ** 2).sum()), rel=1e-3)
    if bias:
        torch.testing.assert_close(pair.bias, layer.bias)
        centred = problems.pair_of(layer, problems.solved(whitening, layer, x), 3)
        assert problems.error(layer, centred, x) < problems.error(layer, pair, x)
    else:
        assert pair.bias is None


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_tokens_are_repetitions(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(100, shape[1])
    times = torch.arange(100) % 4
    repeated = problems.moments_of(layer, x.repeat_interleave(times, dim=0))
    weighed = problems.moments_of(layer, x, weights=0.5 * times.float())
    # float32 products of numbers around 10, summed in another order
    torch.testing.assert_close(weighed.covariance, repeated.covariance, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weighed.mean, repeated.mean, rtol=1e-5, atol=1e-5)
    assert weighed.weight == repeated.weight / 2


def test_moments_of_small_spread_around_a_large_mean() -> None:
    data = np.random.default_rng(0).normal(size=(1000, 4)) * [1, 0.1, 0.01, 0.01] + [1000, -1000, 10, 0]
    single = torch.from_numpy(data).float()
    moments = Moments(4, single.device)
    for part in (single[:1], single[1:1], single[1:600], single[600:]):
        moments.add(part)
    exact = single.double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(0), rtol=1e-6, atol=1e-6)
    spread = exact.std(0)
    scaled = moments.covariance.numpy() / np.outer(spread, spread)
    np.testing.assert_allclose(scaled, np.corrcoef(exact.T), atol=2e-3)


def test_energy_gives_the_lowest_rank_that_keeps_it() -> None:
    layer, x = problems.layer_of((8, 8)), problems.inputs(100, 8)
    found = problems.solved(whitening, layer, x)
    object.__setattr__(found, "energies", np.array([5.0, 3.0, 1.5, 0.5]))
    assert [found.rank(e) for e in (0.1, 0.5, 0.51, 0.95, 1.0)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_refit_is_the_best_map_to_the_targets(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(400, shape[1])
    # What the layer gets now is a distorted copy of what it got, its target what it gave.
    now = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std(0)
    target = layer(x).detach()
    moments = problems.moments_of(layer, now, target)
    problem = factors.refit(factors.problem_of(layer, moments), moments, ridge=1e-9)
    config = whitening.Config()
    fitted = factors.solve(problem, *whitening.metrics(problem, config))
    only_inputs = problems.solved(whitening, layer, now)

    def loss(found: factors.Factors, rank: int) -> float:
        pair = problems.pair_of(layer, found, rank)
        return float((pair(now) - target).detach().double().square().sum(1).mean())

    # At full rank: ordinary least squares on u, by NumPy.
    u = now.double().numpy()
    if shape[0] < shape[1]:
        u = u @ layer.weight.detach().double().numpy().T
    design = np.column_stack([u, np.ones(len(u))])
    residual = (
        target.double().numpy() - design @ np.linalg.lstsq(design, target.double().numpy(), rcond=None)[0]
    )
    best = float((residual**2).sum(1).mean())
    assert loss(fitted, min(shape)) == pytest.approx(best, rel=1e-3)
    for rank in range(1, min(shape) + 1):
        assert best * (1 - 1e-4) <= loss(fitted, rank) < loss(only_inputs, rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_refit_to_the_same_inputs_and_a_stiff_one_change_nothing(shape: tuple[int, int], bias: bool) -> None:
    layer, x = problems.layer_of(shape, bias=bias), problems.inputs(400, shape[1])
    plain = problems.pair_of(layer, problems.solved(whitening, layer, x), 3)
    for targets, ridge in ((layer(x).detach(), 1e-6), (layer(x.flip(0)).detach(), 1e9)):
        moments = problems.moments_of(layer, x, targets)
        problem = factors.refit(factors.problem_of(layer, moments), moments, ridge=ridge)
        pair = problems.pair_of(
            layer, factors.solve(problem, *whitening.metrics(problem, whitening.Config())), 3
        )
        np.testing.assert_allclose(problems.product(pair), problems.product(plain), atol=2e-3)
