"""Integers with scales: what they stand for, and how their bits are packed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from kdcli.models.integers import Integers, group_of, pack, unpack
from kdcli.stages.quantize.rounding import rtn

BITS = range(1, 9)


def random_integers(bits: int, rows: int = 5, columns: int = 77, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


def bit_string(row: list[int], bits: int) -> list[int]:
    """The words of one row, by writing all its bits behind each other in Python's own integers."""
    number = sum((value + (1 << (bits - 1))) << (i * bits) for i, value in enumerate(row))
    words = -(-len(row) * bits // 32)
    unsigned = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 77, 128])
def test_packing_leaves_no_gap_and_can_be_undone(bits: int, columns: int) -> None:
    values = random_integers(bits, columns=columns)
    packed = pack(values, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [bit_string(row, bits) for row in values.tolist()]
    assert torch.equal(unpack(packed, bits, columns), values)


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="the reference is missing")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = random_integers(bits, columns=96)
    assert torch.equal(pack(values, bits), pack_to_int32(values, bits))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("choose", [rtn.symmetric, rtn.asymmetric])
def test_rounding_is_the_definition(choose, group: int | None, bits: int) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(bits))
    weight[2] = 0
    weight[3] = weight[3].abs() + 1  # zero lies outside of this row's range
    made = choose(weight, bits, group=group)
    values, dense = made.values.numpy(), made.dense().numpy()
    for o in range(6):
        for start in range(0, 48, group or 48):
            block = weight[o, start : start + (group or 48)].numpy().astype(np.float64)
            if choose is rtn.symmetric:
                step = np.abs(block).max() / (2 ** (bits - 1) - 1) or 1.0
                zero = 0
            else:
                step = (max(block.max(), 0) - min(block.min(), 0)) / (2**bits - 1) or 1.0
                zero = -(2 ** (bits - 1)) - np.round(min(block.min(), 0) / step)
            q = np.clip(np.round(block / step) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            # Quotients of float32 may fall on the other side of a half: one step, never more.
            assert np.abs(values[o, start : start + len(block)] - q).max() <= 1
            # Half a step where nothing is clipped; a zero point that was rounded moves the range by half a step.
            limit = (0.5 if choose is rtn.symmetric else 1.0) * step * (1 + 1e-5)
            assert np.abs(dense[o, start : start + len(block)] - block).max() <= limit
    assert made.group == group
    assert (dense[2] == 0).all()


def test_smaller_blocks_are_never_worse() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 5] *= 20
    errors = [
        float((rtn.symmetric(weight, 4, group=group).dense() - weight).norm()) for group in (None, 32, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_one_bit_stands_for_its_sign() -> None:
    values = torch.tensor([[1, -1, 1], [-1, -1, 1]], dtype=torch.int8)
    made = Integers(values, torch.tensor([[0.5], [2.0]]), bits=1)
    assert made.dense().tolist() == [[0.5, -0.5, 0.5], [-2, -2, 2]]


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        (384, 64, 64),
        (384, 100, 64),
        (384, 256, 128),
        (48, 64, 16),
        (312, 64, None),
        (40, 32, None),
        (2, 64, None),
    ],
)
def test_block_sizes_are_powers_of_two_that_divide(columns: int, wanted: int, found: int | None) -> None:
    assert group_of(columns, wanted) == found


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_table_is_rounded_in_parts_as_it_is_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(3))
    whole = rtn.table(weight, form)
    monkeypatch.setattr(rtn, "_ROWS", 5)
    parts = rtn.table(weight, form)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scale, whole.scale)
    assert (parts.bits, parts.group, parts.zero is None) == (whole.bits, whole.group, whole.zero is None)
    # Each row by itself, so that parts multiplied out are parts of the product.
    assert torch.equal(torch.cat([part.dense() for part in whole.split(7)]), whole.dense())
    assert whole.largest == int(whole.values.int().abs().max())
    assert Integers(torch.tensor([[-128, 127]], dtype=torch.int8), torch.ones(1, 1)).largest == 128
