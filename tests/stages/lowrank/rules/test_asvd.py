"""ASVD against the paper's scaling in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.lowrank.rules import asvd, svd
from tests.stages.lowrank.rules import problems
from tests.stages.lowrank.rules.problems import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_papers_scaling(shape: tuple[int, int], alpha: float) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    size = x.abs().mean(0)
    found = problems.solved(asvd, layer, x, asvd.Config(alpha=alpha), magnitude=size)
    weight, scale = layer.weight.detach().double().numpy(), size.double().numpy() ** alpha
    for rank in range(1, min(shape) + 1):
        expected = problems.truncated(weight * scale, rank) / scale
        np.testing.assert_allclose(
            problems.product(problems.pair_of(layer, found, rank)), expected, atol=1e-4
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_0_is_plain_svd(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    found = problems.solved(asvd, layer, x, asvd.Config(alpha=0), magnitude=x.abs().mean(0))
    np.testing.assert_allclose(found.energies, problems.solved(svd, layer, x).energies, rtol=1e-5)


def test_outlier_features_are_kept_where_plain_svd_loses_them() -> None:
    layer = problems.layer_of((12, 16))
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30
    losses = []
    for found in (
        problems.solved(asvd, layer, x, magnitude=x.abs().mean(0)),
        problems.solved(svd, layer, x),
    ):
        losses.append(problems.error(layer, problems.pair_of(layer, found, 6), x))
    assert losses[0] < 0.5 * losses[1]


def test_features_that_are_always_zero() -> None:
    layer, x = problems.layer_of((6, 10)), problems.inputs(50, 10)
    x[:, 2:5] = 0
    pair = problems.pair_of(layer, problems.solved(asvd, layer, x, magnitude=x.abs().mean(0)), 6)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-4)
    nothing = torch.zeros(20, 10)
    found = problems.solved(asvd, layer, nothing, magnitude=nothing.abs().mean(0))
    np.testing.assert_allclose(found.energies, problems.solved(svd, layer, nothing).energies, rtol=1e-5)
