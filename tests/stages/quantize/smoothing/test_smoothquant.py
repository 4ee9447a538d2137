"""SmoothQuant's factors by hand, their limits, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.quantize.ranges import affine
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.smoothing.smoothquant import Config, factors


def problem(seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs (N, I) with a few large features, and matrices (O, I) that read them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 24, generator=generator)
    x[:, [3, 17]] *= 60
    return x, [torch.randn(rows, 24, generator=generator) for rows in (7, 12)]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85])
def test_factors_by_hand(alpha: float) -> None:
    x, weights = problem()
    found = factors(x.abs().amax(0), weights, Config(smooth=alpha))
    both = np.concatenate([w.numpy() for w in weights])
    for j in range(x.shape[1]):
        expected = np.abs(x[:, j].numpy()).max() ** alpha / np.abs(both[:, j]).max() ** (1 - alpha)
        assert found[j].item() == pytest.approx(expected, rel=1e-5)  # float32 powers


def test_the_product_is_unchanged() -> None:
    x, weights = problem(1)
    s = factors(x.abs().amax(0), weights, Config())
    for weight in weights:
        exact = x.double() @ weight.double().T
        smooth = (x / s).double() @ (weight * s).double().T
        # two float32 roundings of every term, 24 terms of up to 60
        assert (exact - smooth).abs().max() < 24 * 60 * 4 * 2**-23


def test_half_gives_activations_and_weights_the_same_range() -> None:
    x, weights = problem(2)
    s = factors(x.abs().amax(0), weights, Config(smooth=0.5))
    largest = torch.stack([(w * s).abs().amax(0) for w in weights]).amax(0)
    torch.testing.assert_close((x / s).abs().amax(0), largest, rtol=1e-5, atol=0)


def test_features_without_a_range_are_left_alone() -> None:
    x, weights = problem(3)
    largest = x.abs().amax(0)
    largest[5] = 0
    for weight in weights:
        weight[:, 9] = 0
    found = factors(largest, weights, Config())
    assert found[[5, 9]].tolist() == [1.0, 1.0]
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_outliers_cost_less_after_it() -> None:
    x, weights = problem(4)

    def error(s: torch.Tensor) -> float:
        total = 0.0
        for weight in weights:
            scaled = x / s
            a = affine(float(scaled.min()), float(scaled.max()))
            rounded = torch.fake_quantize_per_tensor_affine(scaled, a.scale, a.zero, 0, 255)
            dense = rtn.symmetric(weight * s, 8).dense()
            total += float(((rounded @ dense.T - x @ weight.T) ** 2).sum())
        return total

    plain = error(torch.ones(x.shape[1]))
    assert error(factors(x.abs().amax(0), weights, Config(smooth=0.5))) < plain / 3
