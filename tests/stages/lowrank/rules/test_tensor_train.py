"""The tensor train against successive SVDs in plain NumPy, its bound, and Tucker-2 where it has to win."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.models import conv_factors
from kdcli.stages.lowrank.rules import tensor_train, tucker2
from kdcli.stages.lowrank.rules.tensor_train import Config
from tests.stages.lowrank.rules.test_tucker2 import SHAPES, inputs_of, layer_of, with_kernel


def naive(kernel: np.ndarray, ranks: tuple[int, ...]) -> tuple[np.ndarray, list[float]]:
    """The approximation of (I, *taps, O) and the energy that every unfolding of the kernel drops."""
    rest, cores, left = kernel, [], 1
    for size, rank in zip(kernel.shape, ranks, strict=False):
        u, s, vt = np.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(left, size, rank))
        rest, left = s[:rank, None] * vt[:rank], rank
    cores.append(rest.reshape(left, kernel.shape[-1], 1))
    product = cores[0]
    for core in cores[1:]:
        product = np.tensordot(product, core, 1)
    dropped = []
    for at, rank in enumerate(ranks, 1):
        rows = int(np.prod(kernel.shape[:at]))
        values = np.linalg.svd(kernel.reshape(rows, -1), compute_uv=False)
        dropped.append(float((values[rank:] ** 2).sum()))
    return product[0, ..., 0], dropped


@pytest.mark.parametrize("name", SHAPES)
def test_full_rank_is_the_layer(name: str) -> None:
    layer = layer_of(name)
    made = tensor_train.decompose(layer, tensor_train.full(layer), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_successive_svds(rank: int) -> None:
    layer = layer_of()
    ranks = tensor_train.by_rank(layer, rank)
    want, dropped = naive(layer.weight.detach().double().numpy().transpose(1, 2, 3, 0), ranks)
    made = tensor_train.decompose(layer, ranks, Config())
    # The factors are rounded to float32.
    np.testing.assert_allclose(conv_factors.kernel(made).numpy(), want.transpose(3, 0, 1, 2), atol=1e-6)
    energy = float(layer.weight.detach().double().square().sum())
    error = conv_factors.error(layer, made) * energy
    assert max(dropped) - 1e-6 * energy <= error <= sum(dropped) + 1e-6 * energy


def test_groups_are_trains_of_their_own() -> None:
    layer = layer_of("groups")
    ranks = (2, 4, 3)
    made = tensor_train.decompose(layer, ranks, Config())
    parts = np.split(layer.weight.detach().double().numpy(), layer.groups)
    want = [naive(part.transpose(1, 2, 3, 0), ranks)[0].transpose(3, 0, 1, 2) for part in parts]
    np.testing.assert_allclose(conv_factors.kernel(made).numpy(), np.concatenate(want), atol=1e-6)


def test_rank_deficient_kernel_at_its_rank_keeps_all_factors() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[:, -1] = layer.weight[:, 0]
        layer.weight[-1] = layer.weight[0]
        layer.weight[:, :, 2] = layer.weight[:, :, 0]
    made = tensor_train.decompose(layer, (9, 18, 13), Config())
    assert len(made) == 4
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


def test_separable_kernels_take_fewer_parameters_than_between_channels() -> None:
    """Channels of full rank, but taps that all share one column and one row: nothing for Tucker-2."""
    random = np.random.default_rng(0)
    mixing = np.linalg.qr(random.normal(size=(16, 16)))[0]  # no direction of the channels is worth more
    kernel = np.einsum("oi,x,y->oixy", mixing, *random.normal(size=(2, 7)))
    layer = with_kernel(kernel)
    ranks = tensor_train.by_energy(layer, 1.0)
    made = tensor_train.decompose(layer, ranks, Config())
    assert conv_factors.error(layer, made) < 1e-9
    budget = conv_factors.parameters(layer, "tensor-train", ranks)
    steps = [r for r in tucker2.ladder(layer) if conv_factors.parameters(layer, "tucker2", r) <= budget]
    other = min(conv_factors.error(layer, tucker2.decompose(layer, r, tucker2.Config())) for r in steps)
    assert budget < 0.3 * kernel.size  # 16 x 16 matrices at seven rows and seven columns, of 49 taps
    assert other > 0.4


def test_factors_share_the_scale() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight *= 1e4
    norms = [
        float(p.detach().norm())
        for n, p in tensor_train.decompose(layer, (4, 5, 6), Config()).named_parameters()
        if "weight" in n
    ]
    # Orthonormal factors of R columns have norm sqrt(R) times the common share.
    assert max(norms) / min(norms) < 3


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_of_zeros(name: str) -> None:
    layer = layer_of(name)
    nn.init.zeros_(layer.weight)
    made = tensor_train.decompose(layer, tensor_train.by_rank(layer, 2), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)
    assert (
        tensor_train.by_evbmf(layer) == tensor_train.by_energy(layer, 0.9) == tensor_train.by_rank(layer, 1)
    )


def test_rows_of_zeros() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[[0, 3, 7, 8]] = 0.0
        layer.weight[:, [1, 2]] = 0.0
    made = tensor_train.decompose(layer, (8, 24, 10), Config())
    x = inputs_of(layer)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


def test_ranks_that_a_neighbour_cannot_fill() -> None:
    layer = layer_of()
    made = tensor_train.decompose(layer, (1, 8, 6), Config())  # one input and three taps fill three
    filled = tensor_train.decompose(layer, (1, 3, 6), Config())
    assert conv_factors.error(layer, made) == pytest.approx(conv_factors.error(layer, filled), rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_ladder_rises_in_cost_and_falls_in_error(name: str) -> None:
    layer = layer_of(name)
    steps = tensor_train.ladder(layer)
    costs = [conv_factors.parameters(layer, "tensor-train", step) for step in steps]
    assert costs == sorted(set(costs))
    assert costs[-1] < sum(p.numel() for p in layer.parameters())
    assert costs[0] == conv_factors.parameters(layer, "tensor-train", (1,) * len(steps[0]))
    errors = [conv_factors.error(layer, tensor_train.decompose(layer, step, Config())) for step in steps]
    # One more direction never raises the error of one truncation; those that follow see another rest.
    assert all(b < a + 0.01 for a, b in pairwise(errors))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_energy_is_kept(name: str, energy: float) -> None:
    layer = layer_of(name)
    made = tensor_train.decompose(layer, tensor_train.by_energy(layer, energy), Config())
    assert 1 - conv_factors.error(layer, made) >= energy - 1e-6


def test_less_energy_takes_lower_ranks() -> None:
    layer = layer_of()
    low, high = (tensor_train.by_energy(layer, energy) for energy in (0.3, 0.8))
    assert low < high < tensor_train.full(layer)


def test_bayes_finds_the_ranks_under_the_noise() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(24, 3)), random.normal(size=(3, 5, 7))
    third, last = random.normal(size=(7, 5, 4)), random.normal(size=(4, 32))
    kernel = np.einsum("ia,axb,byc,co->oixy", first, second, third, last)
    kernel = kernel / kernel.std() + 0.05 * random.normal(size=kernel.shape)
    assert tensor_train.by_evbmf(with_kernel(kernel)) == (3, 7, 4)


def test_same_input_same_bytes() -> None:
    layer = layer_of()
    one, two = (tensor_train.decompose(layer, (4, 5, 6), Config()).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
