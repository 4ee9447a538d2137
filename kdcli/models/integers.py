"""A matrix as integers with scales, and how its bits lie on the disk.

Shape letters: O rows, I columns, G groups of I / G neighbouring columns of one row.

    W_oi ~ (q_oi - z_og) * s_og        with g the group of column i

The layout on disk is that of compressed-tensors: 8 bits as int8 (``int-quantized``), fewer packed without gaps
into 32-bit words (``pack-quantized``), the scales beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WORD = 32


@dataclass(frozen=True)
class Integers:
    """A quantised matrix.

    Attributes:
        values: q, (O, I) int8, for filters of a convolution (O, I, ...), within ``bits`` bits two's
            complement; with 1 bit, -1 and 1.
        scale: s, (O, G) float32; G is 1 for one scale a row. I is a multiple of G.
        zero: z, (O, G) int8 in the same range; None for zero points of 0.
        bits: 1 to 8, what an integer takes on the disk.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: int = 8

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None when a row has one scale."""
        groups = self.scale.shape[1]
        return None if groups == 1 else self.values.shape[1] // groups

    @property
    def largest(self) -> int:
        """The largest magnitude of an integer."""
        return max(int(self.values.max()), -int(self.values.min()), 0) if self.values.numel() else 0

    def split(self, rows: int) -> Iterator[Integers]:
        """Parts of so many rows each, one after the other."""
        for at in range(0, len(self.values), rows):
            part = slice(at, at + rows)
            zero = None if self.zero is None else self.zero[part]
            yield replace(self, values=self.values[part], scale=self.scale[part], zero=zero)

    def dense(self) -> Tensor:
        """The matrix that the integers stand for, (O, I) float32."""
        if self.scale.shape[1] == 1 and self.zero is None:
            return self.values.float() * self.scale
        rows, columns = self.values.shape
        grouped = self.values.float().view(rows, self.scale.shape[1], -1)
        if self.zero is not None:
            grouped -= self.zero.float()[..., None]
        return grouped.mul_(self.scale[..., None]).view(rows, columns)

    def cpu(self) -> Integers:
        """The same in main memory."""
        zero = None if self.zero is None else self.zero.cpu()
        return replace(self, values=self.values.cpu(), scale=self.scale.cpu(), zero=zero)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers (O, I) int8 of ``bits`` bits into (O, ceil(I bits / 32)) int32, lowest bits first.

    An integer is stored with 2^(bits-1) added, so that it has no sign; it may cross the border of two words.
    """
    rows, columns = values.shape
    padded = -(-columns // _WORD) * _WORD
    # 32 integers fill exactly ``bits`` words.
    raw = torch.zeros(rows, padded, dtype=torch.int64, device=values.device)
    raw[:, :columns] = values.long() + (1 << (bits - 1))
    raw = raw.view(-1, _WORD)
    words = torch.zeros(len(raw), bits + 1, dtype=torch.int64, device=values.device)
    for i in range(_WORD):
        word, offset = divmod(i * bits, _WORD)
        shifted = raw[:, i] << offset
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> _WORD
    words = words[:, :bits].reshape(rows, -1)[:, : -(-columns * bits // _WORD)]
    return (words - ((words >> 31) << 32)).to(torch.int32)  # the sign bit of an int32


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack`: (O, columns) int8.

    Raises:
        ValueError: These are not the words of that many columns.
    """
    if words.shape[1] != -(-columns * bits // _WORD):
        raise ValueError(f"{columns} integers of {bits} bits do not lie in {words.shape[1]} words")
    rows = len(words)
    filled = -(-columns // _WORD) * bits
    raw = torch.zeros(rows, filled, dtype=torch.int64, device=words.device)
    raw[:, : words.shape[1]] = words.long() & 0xFFFFFFFF
    raw = torch.nn.functional.pad(raw.view(-1, bits), (0, 1))
    values = torch.empty(len(raw), _WORD, dtype=torch.int8, device=words.device)
    for i in range(_WORD):
        word, offset = divmod(i * bits, _WORD)
        both = raw[:, word] | (raw[:, word + 1] << _WORD)
        values[:, i] = (((both >> offset) & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)
    return values.view(rows, -1)[:, :columns].contiguous()


def group_of(columns: int, wanted: int) -> int | None:
    """The largest power of two of at least 16 that is at most ``wanted`` and divides the columns.

    Runtimes have no other block sizes. None when there is none: then a row has one scale.
    """
    size = 1 << (wanted.bit_length() - 1)
    while size >= 16:
        if columns % size == 0:
            return size
        size //= 2
    return None
