"""Tucker-2 against a higher-order SVD in plain NumPy, its bounds, and the one-sided SVD that it has to beat."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.models import conv_factors
from kdcli.stages.lowrank.rules import tucker2
from kdcli.stages.lowrank.rules.tucker2 import Config

SHAPES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "square": (nn.Conv2d, (10, 14, 3), {"padding": 1}),
    "tall": (nn.Conv2d, (3, 40, 2), {"stride": 2}),  # more outputs than inputs times taps
    "wide": (nn.Conv2d, (40, 3, 2), {"dilation": 2}),
    "groups": (nn.Conv2d, (12, 18, (3, 2)), {"groups": 3}),
    "one-dimensional": (nn.Conv1d, (12, 9, 5), {"padding": "same"}),
    "pointwise": (nn.Conv2d, (10, 14, 1), {"stride": (2, 1)}),
    "no-bias": (nn.Conv2d, (10, 14, (1, 3)), {"bias": False}),
}


def layer_of(name: str = "square") -> Any:
    kind, sizes, options = SHAPES[name]
    torch.manual_seed(0)
    return kind(*sizes, **options)


def inputs_of(layer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, layer.in_channels, *(9, 8)[: layer.weight.ndim - 2], generator=generator)


def with_kernel(kernel: np.ndarray, **options: Any) -> nn.Conv2d:
    """A layer of this kernel (O, I, h, w)."""
    o, i, h, w = kernel.shape
    layer = nn.Conv2d(i, o, (h, w), **options)
    layer.weight.data = torch.from_numpy(kernel).float()
    return layer


def low(o: int, i: int, b: int, a: int, *, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A 3x3 kernel of multilinear rank (B, A) and some noise."""
    random = np.random.default_rng(seed)
    core = random.normal(size=(b, a, 3, 3))
    product = np.einsum("baxy,ob,ia->oixy", core, random.normal(size=(o, b)), random.normal(size=(i, a)))
    return product / product.std() + noise * random.normal(size=(o, i, 3, 3))


def tails(layer: Any, ranks: tuple[int, ...]) -> list[float]:
    """Squared singular values that each mode drops, over all of the kernel's energy, summed over the groups."""
    kernel = layer.weight.detach().double().numpy()
    groups = np.split(kernel, layer.groups)
    found = [0.0, 0.0]
    for part in groups:
        for place, (mode, rank) in enumerate(((1, ranks[0]), (0, ranks[1]))):
            values = np.linalg.svd(np.moveaxis(part, mode, 0).reshape(part.shape[mode], -1), compute_uv=False)
            found[place] += float((values[rank:] ** 2).sum())
    return [value / float((kernel**2).sum()) for value in found]


@pytest.mark.parametrize("name", SHAPES)
def test_full_rank_is_the_layer(name: str) -> None:
    layer = layer_of(name)
    made = tucker2.decompose(layer, tucker2.full(layer), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["square", "groups", "one-dimensional"])
def test_full_rank_of_a_rank_deficient_kernel_keeps_all_three_factors(name: str) -> None:
    layer = layer_of(name)
    with torch.no_grad():  # copies of channels: the multilinear rank is below the sizes
        layer.weight[:, -1] = layer.weight[:, 0]
        layer.weight[1 :: layer.out_channels // layer.groups] = layer.weight[
            0 :: layer.out_channels // layer.groups
        ]
    outputs, inputs = conv_factors.channels(layer)
    made = tucker2.decompose(layer, (inputs - 1, outputs - 1), Config())
    assert len(made) == 3
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


def test_start_is_the_higher_order_svd() -> None:
    layer, (a, b) = layer_of(), (4, 6)
    kernel = layer.weight.detach().double().numpy()
    v = np.linalg.svd(kernel.transpose(1, 0, 2, 3).reshape(10, -1))[0][:, :a]
    u = np.linalg.svd(kernel.reshape(14, -1))[0][:, :b]
    want = np.einsum("po,oixy,iq->pqxy", u @ u.T, kernel, v @ v.T)
    made = tucker2.decompose(layer, (a, b), Config(iterations=0))
    np.testing.assert_allclose(conv_factors.kernel(made).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "pointwise"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dropped_singular_values_bound_the_error(name: str, rank: int) -> None:
    layer = layer_of(name)
    ranks = tucker2.by_rank(layer, rank)
    start, found = (
        conv_factors.error(layer, tucker2.decompose(layer, ranks, Config(iterations=i))) for i in (0, 50)
    )
    dropped = tails(layer, ranks)
    # Rounding of the factors to float32: 1e-7 relative in the kernel, less in its squared error.
    assert max(dropped) - 1e-6 <= found <= start + 1e-6 <= sum(dropped) + 2e-6


def test_iteration_improves_on_the_start() -> None:
    layer = layer_of()
    start, found = (
        conv_factors.error(layer, tucker2.decompose(layer, (3, 3), Config(iterations=i))) for i in (0, 50)
    )
    assert found < start - 1e-3


@pytest.mark.parametrize(("ranks", "place"), [((10, 4), 1), ((4, 14), 0)])
def test_one_full_side_is_the_truncated_svd(ranks: tuple[int, int], place: int) -> None:
    layer = layer_of()
    made = tucker2.decompose(layer, ranks, Config())
    assert len(made) == 2
    assert conv_factors.error(layer, made) == pytest.approx(tails(layer, ranks)[place], rel=1e-5)


def test_pointwise_is_the_truncated_svd_of_a_matrix() -> None:
    layer = layer_of("pointwise")
    made = tucker2.decompose(layer, (3, 3), Config())
    u, s, vt = np.linalg.svd(layer.weight.detach().double().numpy()[..., 0, 0])
    want = (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(conv_factors.kernel(made).numpy()[..., 0, 0], want, atol=1e-6)


def test_fewer_channels_on_both_sides_beat_one_side_at_equal_parameters() -> None:
    layer = with_kernel(low(24, 24, 5, 5, noise=0.1))
    both = (5, 5)
    budget = conv_factors.parameters(layer, "tucker2", both)
    one = max(r for r in range(1, 24) if conv_factors.parameters(layer, "tucker2", (24, r)) <= budget)
    two_sided, one_sided = (
        conv_factors.error(layer, tucker2.decompose(layer, ranks, Config())) for ranks in (both, (24, one))
    )
    # What is left of the first is the noise, 0.01 of the energy; the second lacks directions of the signal.
    assert two_sided < 0.02 < 0.3 < one_sided


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_of_zeros(name: str) -> None:
    layer = layer_of(name)
    nn.init.zeros_(layer.weight)
    made = tucker2.decompose(layer, tucker2.by_rank(layer, 2), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)
    assert tucker2.by_evbmf(layer) == tucker2.by_energy(layer, 0.9) == tucker2.by_rank(layer, 1)


def test_rows_of_zeros() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[[0, 3, 7, 8, 9, 10]] = 0.0
        layer.weight[:, [1, 2, 5]] = 0.0
    made = tucker2.decompose(layer, (7, 8), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


def test_ranks_that_one_side_cannot_use_keep_the_start() -> None:
    layer, ranks = layer_of(), (1, 12)  # one input and nine taps fill nine outputs at most
    dropped = tails(layer, ranks)
    for iterations in (0, 50):
        found = conv_factors.error(layer, tucker2.decompose(layer, ranks, Config(iterations=iterations)))
        assert max(dropped) - 1e-6 <= found <= sum(dropped) + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_ladder_rises_in_cost_and_falls_in_error(name: str) -> None:
    layer = layer_of(name)
    steps = tucker2.ladder(layer)
    costs = [conv_factors.parameters(layer, "tucker2", step) for step in steps]
    assert costs == sorted(set(costs))
    assert costs[-1] < sum(p.numel() for p in layer.parameters())
    start = Config(iterations=0)
    errors = [conv_factors.error(layer, tucker2.decompose(layer, step, start)) for step in steps]
    assert all(b < a + 1e-6 for a, b in pairwise(errors))


def test_ladder_is_the_best_start_for_its_parameters() -> None:
    layer = layer_of("one-dimensional")
    start = Config(iterations=0)
    every = [
        (
            conv_factors.parameters(layer, "tucker2", (a, b)),
            conv_factors.error(layer, tucker2.decompose(layer, (a, b), start)),
        )
        for a in range(1, 13)
        for b in range(1, 10)
    ]
    for step in tucker2.ladder(layer):
        cost = conv_factors.parameters(layer, "tucker2", step)
        own = conv_factors.error(layer, tucker2.decompose(layer, step, start))
        assert own <= min(error for other, error in every if other <= cost) + 1e-6


def test_depth_that_never_pays_has_no_ladder() -> None:
    assert tucker2.ladder(nn.Conv2d(2, 2, 1)) == []


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_energy_is_kept_with_the_fewest_parameters(name: str, energy: float) -> None:
    layer = layer_of(name)
    ranks = tucker2.by_energy(layer, energy)
    start = Config(iterations=0)
    assert 1 - conv_factors.error(layer, tucker2.decompose(layer, ranks, start)) >= energy - 1e-6
    cost = conv_factors.parameters(layer, "tucker2", ranks)
    for a, b in ((ranks[0] - 1, ranks[1]), (ranks[0], ranks[1] - 1)):
        fits = a >= 1 and b >= 1 and (name != "pointwise" or a == b)
        if fits and conv_factors.parameters(layer, "tucker2", (a, b)) < cost:
            kept = 1 - conv_factors.error(layer, tucker2.decompose(layer, (a, b), start))
            assert kept < energy + 1e-6


def test_bayes_finds_the_ranks_under_the_noise() -> None:
    layer = with_kernel(low(32, 24, 6, 4, noise=0.2))
    assert tucker2.by_evbmf(layer) == (4, 6)


def test_same_input_same_bytes() -> None:
    layer = layer_of()
    one, two = (tucker2.decompose(layer, (4, 5), Config()).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
