"""Half precision: numpy's rounding, the bound of its definition, and the end of its range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.errors import InputError
from kdcli.stages.quantize.schemes import fp16


def test_rounding_is_numpys_and_within_half_a_digit() -> None:
    weight = (
        torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40)[:, None]
    )
    rounded = fp16.quantise(weight)
    assert rounded.dtype == torch.float16
    assert np.array_equal(rounded.numpy(), weight.numpy().astype(np.float16))
    # 11 binary digits, half of the last; nothing here is below the smallest normal number but by chance.
    normal = weight.abs() >= 2**-14
    assert bool(((weight - rounded.float()).abs() <= 2**-11 * weight.abs())[normal].all())


def test_rounding_twice_is_rounding_once() -> None:
    weight = torch.randn(8, 8)
    assert torch.equal(fp16.quantise(fp16.quantise(weight).float()), fp16.quantise(weight))


@pytest.mark.parametrize("largest", [65520.0, -1e30])
def test_a_weight_beyond_its_range_is_refused(largest: float) -> None:
    with pytest.raises(InputError, match="beyond the 65504"):
        fp16.quantise(torch.tensor([1.0, largest]))
    fp16.quantise(torch.tensor([65504.0]))
