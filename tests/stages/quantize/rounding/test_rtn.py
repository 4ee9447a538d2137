"""Rounding to the nearest: the range of a block, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.models.integers import Integers
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.schemes import int4
from kdcli.stages.quantize.schemes.int4 import Config


def rounded(weight: torch.Tensor, **settings: object) -> Integers:
    """As int4 has it rounded."""
    config = Config(**settings)
    blocks = int4.group(weight, config)
    return rtn.quantise(weight, config.bits, blocks, rtn.Config(), symmetric=config.symmetric)


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))


def by_hand(block: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """One block, in float64."""
    if symmetric:
        step = np.abs(block).max() / (2 ** (bits - 1) - 1)
        return np.round(block / step) * step
    low, high = min(block.min(), 0.0), max(block.max(), 0.0)
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return (np.clip(np.round(block / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_blocks_are_rounded_by_themselves(bits: int, symmetric: bool) -> None:
    weight = matrix(bits)
    made = rounded(weight, bits=bits, group=32, symmetric=symmetric)
    assert made.scale.shape == (24, 4)
    assert (made.zero is None) == symmetric
    found = made.dense().double().numpy()
    for o in range(24):
        for start in range(0, 128, 32):
            want = by_hand(weight[o, start : start + 32].double().numpy(), bits, symmetric)
            # One in float32 of the largest quotient, 255.
            close = np.isclose(found[o, start : start + 32], want, rtol=0, atol=1e-5)
            # A quotient within 1e-4 of a half may go either way.
            assert close.mean() > 0.95


def test_what_lies_on_the_grid_stays_as_it_is() -> None:
    values = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(0))
    values[:, 0], values[:, 1], values[:, 32], values[:, 33] = -8, 7, -8, 7
    weight = values * 0.25
    made = rounded(weight, group=32, symmetric=False)
    assert torch.equal(made.values, values.to(torch.int8))
    assert torch.equal(made.dense(), weight)


def test_zero_points_pay_for_lopsided_blocks() -> None:
    weight = matrix().abs()
    lopsided = rounded(weight, symmetric=False).dense()
    around_zero = rounded(weight).dense()
    # 16 steps over one side against 8: half the step, a quarter of the squared error.
    ratio = float((weight - lopsided).pow(2).sum() / (weight - around_zero).pow(2).sum())
    assert 0.15 < ratio < 0.35


def test_a_width_without_blocks_has_a_scale_a_row() -> None:
    made = rounded(torch.randn(3, 40))
    assert made.group is None
    assert made.scale.shape == (3, 1)
