"""Dynamic int8 against plain numpy, and the arithmetic of processors without VNNI."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli import registry
from kdcli.errors import UsageError
from kdcli.models.integers import Integers
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import Scheme
from kdcli.stages.quantize.schemes import dynamic_int8
from kdcli.stages.quantize.schemes.dynamic_int8 import Config

CASES = [(True, False, 64), (False, False, 127), (True, True, 127), (False, True, 127)]
INT16_MAX = 32767


def matrix(seed: int = 0, rows: int = 37, columns: int = 53) -> torch.Tensor:
    """Rows of very different size, one of them all zeros, one with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-4, 3, rows)[:, None]
    weight[3] = 0
    weight[5, 7] = 1e4
    return weight


def quantise(
    weight: torch.Tensor, config: Config, *, table: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of a matrix, or of an embedding table."""
    made = rtn.table(weight, "int8") if table else dynamic_int8.quantise(weight, config)
    assert made.zero is None
    assert made.bits == 8
    return made.values, made.scale


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return Integers(values, scale).dense()


def by_hand(weight: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """One row after the other, in Python's own arithmetic."""
    values, scales = [], []
    for row in weight.tolist():
        largest = max(abs(w) for w in row)
        scale = float(np.float32(largest / limit)) if largest else 1.0
        values.append([round(float(np.float32(w) / np.float32(scale))) for w in row])
        scales.append([scale])
    return np.array(values, dtype=np.int8), np.array(scales, dtype=np.float32)


@pytest.mark.parametrize(("reduce_range", "table", "limit"), CASES)
def test_integers_and_scales_are_those_of_the_definition(reduce_range: bool, table: bool, limit: int) -> None:
    weight = matrix()
    values, scale = quantise(weight, Config(reduce_range=reduce_range), table=table)
    expected_values, expected_scale = by_hand(weight.numpy(), limit)
    assert values.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert np.array_equal(values.numpy(), expected_values)
    assert np.array_equal(scale.numpy(), expected_scale)
    # Every row uses its range to the end, except the one of zeros.
    largest = values.int().abs().amax(dim=1)
    assert largest[3] == 0
    assert (torch.cat([largest[:3], largest[4:]]) == limit).all()


@pytest.mark.parametrize(("reduce_range", "table", "limit"), CASES)
def test_no_weight_moves_further_than_half_a_step(reduce_range: bool, table: bool, limit: int) -> None:
    weight = matrix(1)
    values, scale = quantise(weight, Config(reduce_range=reduce_range), table=table)
    error = (weight.double() - values.double() * scale.double()).abs()
    # The quotient is rounded to float32 before it is rounded to an integer: one part in 2^24 of at most L.
    assert (error <= scale.double() * (0.5 + limit * 2**-24)).all()
    assert error.max() > 0


@pytest.mark.parametrize(("reduce_range", "table", "limit"), CASES)
def test_quantising_the_rounded_weights_gives_the_same_integers(
    reduce_range: bool, table: bool, limit: int
) -> None:
    config = Config(reduce_range=reduce_range)
    for seed in range(5):
        values, scale = quantise(matrix(seed), config, table=table)
        again, scale_again = quantise(dequantise(values, scale), config, table=table)
        assert torch.equal(values, again)
        if limit == 64:
            assert torch.equal(scale, scale_again)
        else:
            torch.testing.assert_close(scale, scale_again, rtol=2**-23, atol=0)


@pytest.mark.parametrize("limit", [64, 127])
def test_a_scale_a_row_is_never_worse_than_one_for_all(limit: int) -> None:
    weight = matrix(2).double()
    values, scale = quantise(weight.float(), Config(reduce_range=limit == 64))
    step = weight.abs().max() / limit
    whole = (weight / step).round() * step
    by_row = ((weight - values.double() * scale.double()) ** 2).sum()
    assert by_row <= ((weight - whole) ** 2).sum()
    # Small rows disappear altogether when a big row sets the scale.
    assert (whole[0] == 0).all()
    assert (values[0] != 0).any()


def test_extremes_stay_finite() -> None:
    weight = torch.tensor([[3e38, -3e38, 1.0], [1e-36, -5e-37, 0.0], [1e-44, -1e-44, 0.0], [0.0, -0.0, 0.0]])
    values, scale = quantise(weight, Config())
    assert torch.isfinite(scale).all()
    assert values.tolist() == [[64, -64, 0], [64, -32, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.isfinite(dequantise(values, scale)).all()


def pairs_in_16_bits(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What VPMADDUBSW leaves of u0 * w0 + u1 * w1: the sum, saturated to 16 bits."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    return np.clip(products[..., 0::2] + products[..., 1::2], -INT16_MAX - 1, INT16_MAX)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_products_with_uint8_survive_16_bit_sums_only_with_the_reduced_range(reduce_range: bool) -> None:
    # The worst case: neighbouring weights at the end of the range, activations all 255.
    weight = torch.ones(4, 8) * torch.tensor([[1.0], [-1.0], [2.0], [-0.5]])
    values, _ = quantise(weight, Config(reduce_range=reduce_range))
    activations = np.full(8, 255, dtype=np.uint8)
    exact = activations.astype(np.int64) @ values.numpy().T.astype(np.int64)
    summed = pairs_in_16_bits(activations, values.numpy()).sum(-1)
    assert np.array_equal(exact, summed) == reduce_range
    assert (2 * 255 * dynamic_int8.limit(Config(reduce_range=reduce_range)) <= INT16_MAX) == reduce_range


def test_it_is_registered_with_its_settings() -> None:
    method = registry.load("quantize", "dynamic-int8", Scheme)
    assert method is dynamic_int8.METHOD
    assert method.configured({}).reduce_range is True
    assert method.configured({"reduce_range": "false"}).reduce_range is False
    with pytest.raises(UsageError, match="reduce_range"):
        method.configured({"reduced_range": "false"})
    with pytest.raises(UsageError, match="reduce_range=maybe"):
        method.configured({"reduce_range": "maybe"})
