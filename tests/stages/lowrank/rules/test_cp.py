"""CP against alternating least squares in plain NumPy, kernels of known rank, and Tucker-2 where it has to win."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.models import conv_factors
from kdcli.stages.lowrank.rules import cp, tucker2
from kdcli.stages.lowrank.rules.cp import Config
from tests.stages.lowrank.rules.test_tucker2 import SHAPES, inputs_of, layer_of, with_kernel


def products(rank: int, *sizes: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A kernel that is a sum of ``rank`` products of vectors, and some noise."""
    random = np.random.default_rng(seed)
    kernel = np.einsum("or,ir,xr,yr->oixy", *(random.normal(size=(n, rank)) for n in sizes))
    return kernel / kernel.std() + noise * random.normal(size=sizes)


def naive(kernel: np.ndarray, rank: int, rounds: int, seed: int) -> float:
    """Relative squared error of plain alternating least squares: one exact solution a mode, round after round."""
    random = np.random.default_rng(seed)
    factors = [random.normal(size=(n, rank)) for n in kernel.shape]
    for _ in range(rounds):
        for mode, size in enumerate(kernel.shape):
            others = [f for m, f in enumerate(factors) if m != mode]
            joined = np.einsum("ar,br,cr->abcr", *others).reshape(-1, rank)
            matrix = np.moveaxis(kernel, mode, 0).reshape(size, -1)
            factors[mode] = np.linalg.lstsq(joined, matrix.T, rcond=None)[0].T
    product = np.einsum("or,ir,xr,yr->oixy", *factors)
    return float(((kernel - product) ** 2).sum() / (kernel**2).sum())


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_as_good_as_plain_alternation(rank: int) -> None:
    kernel = products(8, 12, 10, 3, 3, noise=0.5)
    layer = with_kernel(kernel)
    found = conv_factors.error(layer, cp.decompose(layer, (rank,), Config()))
    others = [naive(kernel, rank, 100, seed) for seed in range(5)]
    # Every start ends in another local minimum; ours must not be worse than the worst of five by 5%.
    assert min(others) * 0.95 <= found <= max(others) * 1.05


@pytest.mark.parametrize("name", ["square", "groups", "one-dimensional", "pointwise", "no-bias"])
def test_kernel_of_this_rank_is_reproduced(name: str) -> None:
    layer = layer_of(name)
    outputs, inputs = conv_factors.channels(layer)
    taps = [layer.kernel_size[a] for a in conv_factors.spatial_axes(layer)]
    random = np.random.default_rng(0)
    kernel = np.zeros((layer.groups, outputs, inputs, *taps))
    for group in range(layer.groups):
        for _ in range(2):
            product = np.ones(())
            for size in (outputs, inputs, *taps):
                product = np.multiply.outer(product, random.normal(size=size))
            kernel[group] += product
    layer.weight.data = torch.from_numpy(kernel).float().reshape(layer.weight.shape)
    made = cp.decompose(layer, (2,), Config(iterations=1000, tolerance=1e-12, penalty=1e-10))
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5 * float(layer(x).detach().abs().max()))


def test_pointwise_is_nearly_the_truncated_svd() -> None:
    layer = layer_of("pointwise")
    values = torch.linalg.svdvals(layer.weight.detach().double()[..., 0, 0]).square()
    best = float(values[3:].sum() / values.sum())
    # The penalty and the end of the iteration cost less than 1% of the error.
    assert best <= conv_factors.error(layer, cp.decompose(layer, (3,), Config())) + 1e-9 <= best * 1.01


def test_sums_of_products_take_fewer_parameters_than_between_channels() -> None:
    layer = with_kernel(products(12, 16, 16, 5, 5, noise=0.05))
    found = conv_factors.error(layer, cp.decompose(layer, (12,), Config()))
    budget = conv_factors.parameters(layer, "cp", (12,))
    steps = [r for r in tucker2.ladder(layer) if conv_factors.parameters(layer, "tucker2", r) <= budget]
    other = min(conv_factors.error(layer, tucker2.decompose(layer, r, tucker2.Config())) for r in steps)
    assert found < 0.05 < 0.2 < other


def test_penalty_keeps_components_from_growing_against_each_other() -> None:
    """aab + aba + baa has rank 3, but products of rank 2 come as near as one likes while they grow."""
    a, b = np.eye(4)[:2]
    kernel = sum(np.einsum("o,i,x->oix", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    layer = nn.Conv1d(4, 4, 4)
    layer.weight.data = torch.from_numpy(np.asarray(kernel)).float()

    def largest(penalty: float) -> tuple[float, float]:
        made: Any = cp.decompose(layer, (2,), Config(iterations=3000, tolerance=1e-12, penalty=penalty))
        each = (
            made[0].weight.norm(dim=(1, 2))
            * made[1].weight.norm(dim=(1, 2))
            * made[2].weight.norm(dim=(0, 2))
        )
        return float(each.detach().max()), conv_factors.error(layer, made)

    (free, _), (held, error) = largest(1e-12), largest(1e-4)
    # Without it they keep growing, slower and slower, for as long as one iterates.
    assert held < 0.6 * free
    assert error < 1e-3


@pytest.mark.parametrize("rank", [8, 32, 50, 108])
def test_no_product_outgrows_the_kernel_up_to_full_rank(rank: int) -> None:
    """50 is the last rank that saves parameters, 108 is full."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, bias=False)
    assert (cp.full(layer), cp.ladder(layer)[-1]) == ((108,), (50,))

    def largest(penalty: float) -> tuple[float, float]:
        made: Any = cp.decompose(layer, (rank,), Config(penalty=penalty))
        first, *axes, last = (factor.weight.detach() for factor in made)
        sizes = [w.flatten(1).norm(dim=1) for w in (first, *axes)] + [last.flatten(1).norm(dim=0)]
        return float(torch.stack(sizes).prod(0).max() / layer.weight.detach().norm()), conv_factors.error(
            layer, made
        )

    held, error = largest(Config().penalty)
    # Seen are 0.61 at most with the penalty, and 7.5 at full rank without.
    assert held < 0.8
    if rank == 108:
        assert error < 3e-4
        assert largest(1e-12)[0] > 2


@pytest.mark.parametrize("rank", [5, 20])
def test_rank_above_that_of_the_kernel(rank: int) -> None:
    layer = with_kernel(products(2, 8, 6, 3, 3))
    made = cp.decompose(layer, (rank,), Config())
    assert all(bool(p.isfinite().all()) for p in made.parameters())
    # The penalty shrinks a component of norm 1 by about its weight, 1e-4.
    assert conv_factors.error(layer, made) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_of_zeros(name: str) -> None:
    layer = layer_of(name)
    nn.init.zeros_(layer.weight)
    made = cp.decompose(layer, cp.by_rank(layer, 2), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)
    assert cp.by_evbmf(layer) == cp.by_rank(layer, 1)


def test_rows_of_zeros_stay_zeros() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[[0, 3, 7]] = 0.0
        layer.weight[:, [1, 2]] = 0.0
    product = conv_factors.kernel(cp.decompose(layer, (6,), Config()))
    assert float(product[[0, 3, 7]].abs().max()) < 1e-6
    assert float(product[:, [1, 2]].abs().max()) < 1e-6


def test_factors_of_a_component_have_equal_norms() -> None:
    layer = layer_of()
    made: Any = cp.decompose(layer, (4,), Config())
    first, second, third, last = (f.weight.detach().flatten(1) for f in made)
    norms = torch.stack([first.norm(dim=1), second.norm(dim=1), third.norm(dim=1), last.norm(dim=0)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SHAPES)
def test_ladder_ends_at_break_even(name: str) -> None:
    layer = layer_of(name)
    steps = cp.ladder(layer)
    dense = sum(p.numel() for p in layer.parameters())
    costs = [conv_factors.parameters(layer, "cp", step) for step in steps]
    assert costs == sorted(set(costs))
    assert costs[-1] < dense
    assert steps[0] == (1,)
    last = steps[-1][0]
    assert last == cp.full(layer)[0] or conv_factors.parameters(layer, "cp", (last + 1,)) >= dense


def test_energy_takes_the_first_rank_that_keeps_it() -> None:
    layer = with_kernel(products(5, 10, 8, 3, 3, noise=0.1))
    (rank,) = cp.by_energy(layer, 0.9)
    kept, less = (
        1 - conv_factors.error(layer, cp.decompose(layer, (r,), Config())) for r in (rank, rank - 1)
    )
    assert less < 0.9 <= kept


def test_energy_beyond_reach_ends_above_break_even() -> None:
    layer = layer_of()
    ranks = cp.by_energy(layer, 1.0)
    assert conv_factors.parameters(layer, "cp", ranks) >= sum(p.numel() for p in layer.parameters())


def test_bayes_finds_what_no_fewer_products_have() -> None:
    assert cp.by_evbmf(with_kernel(products(6, 40, 32, 3, 3, noise=0.3))) == (6,)


def test_full_rank_is_enough_for_any_kernel() -> None:
    layer = nn.Conv1d(4, 5, 3, padding=1)
    assert cp.full(layer) == (12,)
    made = cp.decompose(layer, (12,), Config(iterations=3000, tolerance=1e-14, penalty=1e-10))
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


def test_seed_decides_the_start() -> None:
    layer = layer_of()

    def weights(seed: int) -> dict[str, Any]:
        return cp.decompose(layer, (4,), Config(seed=seed)).state_dict()

    one, two, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
