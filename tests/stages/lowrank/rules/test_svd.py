"""Plain SVD against NumPy's, and against a method that sees the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.lowrank.rules import svd, whitening
from tests.stages.lowrank.rules import problems
from tests.stages.lowrank.rules.problems import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_numpys_truncated_svd(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    found = problems.solved(svd, layer, x)
    weight = layer.weight.detach().double().numpy()
    d = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(found.energies, d**2, rtol=1e-4, atol=1e-6)  # a tie of 1e-9, roots of 1e-7
    for rank in range(1, min(shape) + 1):
        pair = problems.pair_of(layer, found, rank)
        # float32 factors of numbers of order 1
        np.testing.assert_allclose(problems.product(pair), problems.truncated(weight, rank), atol=1e-5)
        torch.testing.assert_close(pair.bias, layer.bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_predicted_error_is_the_measured_one(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    found = problems.solved(svd, layer, x)
    spread = float((layer(x) - layer(x).mean(0)).detach().double().square().sum(1).mean())
    for rank in range(1, min(shape)):
        measured = problems.error(layer, problems.pair_of(layer, found, rank), x) / spread
        assert measured == pytest.approx(found.errors[rank], rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_changes_nothing(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(50, shape[1])
    pair = problems.pair_of(layer, problems.solved(svd, layer, x), min(shape))
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-5)


def test_inputs_do_not_matter_to_the_factors_and_the_mean_only_to_the_bias() -> None:
    layer = problems.layer_of((6, 10))
    one, two = (problems.solved(svd, layer, problems.inputs(99, 10, seed=s)) for s in (0, 1))
    np.testing.assert_allclose(one.energies, two.energies, rtol=1e-6)
    x = problems.inputs(99, 10)
    centred = problems.pair_of(layer, problems.solved(svd, layer, x, svd.Config(centred=True)), 3)
    plain = problems.pair_of(layer, one, 3)
    np.testing.assert_allclose(problems.product(centred), problems.product(plain), atol=1e-6)
    torch.testing.assert_close(centred(x).mean(0), layer(x).mean(0), rtol=0, atol=1e-4)
    assert problems.error(layer, centred, x) < problems.error(layer, plain, x)


def test_it_loses_more_than_whitening_and_less_on_the_weights() -> None:
    layer, x = problems.layer_of((8, 8)), problems.inputs(500, 8)
    pairs = [problems.pair_of(layer, problems.solved(m, layer, x), 3) for m in (svd, whitening)]
    on_inputs = [problems.error(layer, pair, x) for pair in pairs]
    on_weights = [np.linalg.norm(layer.weight.detach().numpy() - problems.product(pair)) for pair in pairs]
    assert on_inputs[0] > 3 * on_inputs[1]
    assert on_weights[0] < on_weights[1]


def test_a_zero_matrix_and_all_zero_rows() -> None:
    layer, x = problems.layer_of((6, 10)), problems.inputs(40, 10)
    with torch.no_grad():
        layer.weight[:4] = 0
    pair = problems.pair_of(layer, problems.solved(svd, layer, x), 2)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-5)
    torch.nn.init.zeros_(layer.weight)
    pair = problems.pair_of(layer, problems.solved(svd, layer, x), 2)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-5)
