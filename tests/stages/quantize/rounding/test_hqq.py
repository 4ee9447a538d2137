"""HQQ against a plain numpy loop, and against rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.quantize.rounding import hqq, rtn
from kdcli.stages.quantize.rounding.hqq import Config


def matrix(seed: int = 0) -> torch.Tensor:
    """Weights with heavy tails, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator)
    return weight * (1 + 3 * (torch.rand(16, 64, generator=generator) < 0.03))


def by_hand(block: np.ndarray, bits: int, config: Config) -> tuple[float, float]:
    """The scale and zero point of one block after all rounds, the best by the p-norm; float64 throughout."""
    low, high = min(block.min(), 0.0), max(block.max(), 0.0)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (high - low) / (2**bits - 1)
    zero = bottom - np.round(low / scale)
    best, kept, beta = np.inf, (scale, zero), config.beta
    for _ in range(config.iterations + 1):
        q = np.clip(np.round(block / scale) + zero, bottom, top)
        d = block - (q - zero) * scale
        error = (np.abs(d) ** config.p).sum()
        if error < best:
            best, kept = error, (scale, zero)
        with np.errstate(divide="ignore"):
            e = np.where(
                d != 0, np.sign(d) * np.maximum(np.abs(d) - np.abs(d) ** (config.p - 1) / beta, 0), 0
            )
        target = block - e
        zero = np.clip(np.round((q - target / scale).mean()), bottom, top)
        steps = q - zero
        fitted = (steps * target).sum() / (steps**2).sum()
        scale = fitted if fitted > 0 else scale
        beta *= config.kappa
    return kept


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_and_zero_points_are_those_of_the_rounds_done_by_hand(bits: int) -> None:
    weight, config = matrix(bits), Config()
    made = hqq.quantise(weight, bits, 32, config)
    assert made.zero is not None
    same = 0
    for o in range(16):
        for g in range(2):
            scale, zero = by_hand(weight[o, 32 * g : 32 * g + 32].double().numpy(), bits, config)
            same += bool(abs(float(made.scale[o, g]) - scale) < 1e-4 * scale and int(made.zero[o, g]) == zero)
    # Where two rounds are equally good to float32, either may be kept.
    assert same >= 30


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_norm_it_minimises_is_never_above_that_of_the_nearest(symmetric: bool) -> None:
    weight, config = matrix(), Config()
    plain = (rtn.symmetric if symmetric else rtn.asymmetric)(weight, 3, group=32).dense()
    found = hqq.quantise(weight, 3, 32, config, symmetric=symmetric)
    assert (found.zero is None) == symmetric

    def norms(dense: torch.Tensor) -> torch.Tensor:
        return (weight - dense).abs().pow(config.p).view(16, 2, 32).sum(2)

    assert bool((norms(found.dense()) <= norms(plain) * (1 + 1e-5)).all())
    assert float(norms(found.dense()).sum()) < 0.97 * float(norms(plain).sum())


def test_a_matrix_on_the_grid_stays() -> None:
    values = torch.randint(-8, 8, (4, 32), generator=torch.Generator().manual_seed(1))
    values[:, 0], values[:, 1] = -8, 7
    weight = values * 0.5
    assert torch.equal(hqq.quantise(weight, 4, 32, Config()).dense(), weight)


def test_zeros_stay_zeros() -> None:
    made = hqq.quantise(torch.zeros(2, 32), 4, 16, Config())
    assert torch.equal(made.dense(), torch.zeros(2, 32))
    assert bool(torch.isfinite(made.scale).all())
