"""Integers of few bits in an ONNX file, unpacked by operators that every runtime has.

A byte holds 8 / b integers of b bits. What a byte stands for is looked up in a table of 256 rows:

    Gather(table (256, 8 / b), Cast(bytes)) -> Reshape

For a matrix all of this is constant, so a runtime does it once, when it loads the file, and multiplies 8-bit
integers from then on; the file keeps the few bits. For an embedding table it is done for the rows of a batch.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

import numpy as np
from onnx import NodeProto, TensorProto

UNPACKED = (1, 2, 4)
"""Bits that fill a byte."""


def pack(raw: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned integers (O, I) of 1, 2, 4 or 8 bits into bytes (O, I bits / 8), the first in the lowest bits."""
    parts = raw.reshape(len(raw), -1, 8 // bits)
    packed = np.zeros(parts.shape[:2], dtype=np.uint8)
    for i in range(parts.shape[2]):
        packed |= parts[:, :, i] << (bits * i)
    return packed


def codes(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of ``bits`` bits two's complement (1 bit: -1 and 1) as unsigned ones."""
    if bits == 1:
        return ((values.astype(np.int16) + 1) // 2).astype(np.uint8)
    return (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def meaning(bits: int) -> np.ndarray:
    """The integers (256, 8 / bits) int8 that every byte of :func:`pack` and :func:`codes` stands for."""
    byte = np.arange(256)[:, None] >> (bits * np.arange(8 // bits))
    code = byte & ((1 << bits) - 1)
    return (2 * code - 1 if bits == 1 else code - (1 << (bits - 1))).astype(np.int8)


class Packable(Protocol):
    """What :class:`kdcli.export.int8.Stored` is."""

    @property
    def values(self) -> np.ndarray: ...  # (O, I) int8
    @property
    def scale(self) -> np.ndarray: ...  # (O, G)
    @property
    def zero(self) -> np.ndarray | None: ...
    @property
    def bits(self) -> int: ...


class Unpacking:
    """The part of a rewriter of graphs that writes packed weights; ``pack`` turns it on for matrices."""

    pack: bool
    _made: MutableMapping[tuple[str, str], tuple[str, ...]]

    def _initialise(self, name: str, array: np.ndarray) -> None:
        raise NotImplementedError

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        raise NotImplementedError

    def _packs(self, weight: Packable, *, table: bool = False) -> bool:
        """Whether a weight stays packed in the file and is unpacked by operators."""
        side = weight.values.shape[1 if table else 0]  # along which integers share a byte
        plain = weight.zero is None and weight.scale.shape[1] == 1
        # Few runtimes have a lookup of 2 bits.
        wanted = self.pack or (table and weight.bits < 4)
        return wanted and plain and weight.bits in UNPACKED and side % (8 // weight.bits) == 0

    def _held(self, weight: Packable, *, table: bool = False) -> str:
        return f"int{weight.bits}, packed" if self._packs(weight, table=table) else "int8"

    def _meaning(self, bits: int) -> str:
        """Name of what a byte stands for, once for all weights."""
        name = f"byte_of_{bits}_bits"
        if ("meaning", name) not in self._made:
            self._initialise(name, meaning(bits))
            self._made["meaning", name] = (name,)
        return name

    def _unpacked(self, name: str, values: np.ndarray, bits: int) -> None:
        """Integers (I, O) called ``name``, by operators that a runtime carries out when it loads the file."""
        self._initialise(f"{name}_bytes", pack(codes(values, bits), bits))
        self._initialise(f"{name}_shape", np.array(values.shape, np.int64))
        self._add("Cast", [f"{name}_bytes"], f"{name}_index", to=TensorProto.INT32)
        self._add("Gather", [self._meaning(bits), f"{name}_index"], f"{name}_parts")
        self._add("Reshape", [f"{name}_parts", f"{name}_shape"], name)

    def _packed_lookup(self, node: NodeProto, weight: Packable) -> None:
        """Rows of a table (V, D) with a scale a row, whose bytes are looked up and then what they stand for."""
        name, index, output = node.input[0], node.input[1], node.output[0]
        key = ("packed-table", name)
        if key not in self._made:
            self._made[key] = (f"{name}_bytes", f"{name}_scale", f"{name}_width")
            self._initialise(f"{name}_bytes", pack(codes(weight.values, weight.bits), weight.bits))
            self._initialise(f"{name}_scale", weight.scale)
            self._initialise(f"{name}_width", np.array([weight.values.shape[1]], np.int64))
        held, scale, width = self._made[key]
        self._add("Gather", [held, index], f"{output}_bytes")
        self._add("Cast", [f"{output}_bytes"], f"{output}_index", to=TensorProto.INT32)
        self._add("Gather", [self._meaning(weight.bits), f"{output}_index"], f"{output}_parts")
        self._add("Shape", [index], f"{output}_rows")
        self._add("Concat", [f"{output}_rows", width], f"{output}_shape", axis=0)
        self._add("Reshape", [f"{output}_parts", f"{output}_shape"], f"{output}_integers")
        self._add("Cast", [f"{output}_integers"], f"{output}_floats", to=TensorProto.FLOAT)
        self._add("Gather", [scale, index], f"{output}_scales")
        self._add("Mul", [f"{output}_floats", f"{output}_scales"], output)
