"""From a float ONNX graph to one that holds a checkpoint's integers and rounds activations at run time.

The graph is not quantised a second time: each float weight that equals the checkpoint's integers times
their scales, bit for bit, is replaced by those integers. What the checkpoint keeps in float stays float.
onnxruntime's own ``quantize_dynamic`` gives the same matrices (a test holds the two together), but it
rounds embeddings with one scale a table, leaves an attention bias out without a word, knows nothing of what
the checkpoint keeps in float, and takes seconds where this takes tenths of one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from kdcli.export import files, packed
from kdcli.export.runtimes import PACKED_BITS

Kernel = Literal["integer", "blocks"]
"""``integer``: products of integers, activations rounded to uint8. ``blocks``: MatMulNBits, float activations."""

Range = tuple[float, int]
"""Scale and zero point of activations as uint8: x ~ scale * (q - zero)."""


class Stored(NamedTuple):
    """A quantised weight: W_oi = (q_oi - z_og) * s_og, with g the group of column i."""

    values: np.ndarray  # q, (O, I) int8
    scale: np.ndarray  # s, (O, G) float32
    zero: np.ndarray | None = None  # z, (O, G) int8
    bits: int = 8

    def dense(self) -> np.ndarray:
        """(O, I) float32, bit for bit what the checkpoint multiplies out."""
        rows, columns = self.values.shape
        grouped = self.values.astype(np.float32).reshape(rows, self.scale.shape[1], -1)
        if self.zero is not None:
            grouped -= self.zero.astype(np.float32)[..., None]
        grouped *= self.scale[..., None]
        return grouped.reshape(rows, columns)


# Smaller blocks cost more time and space than they are worth, and onnxruntime has none below 16.
_WIDEST, _NARROWEST = 128, 16

# What QAttention can do of what Attention can; anything else stays a float operator.
_ATTENTION_ATTRIBUTES = frozenset({"num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary"})
_ATTENTION_INPUTS = 4  # input, weights, bias, mask


def quantise_graph(
    source: Path,
    target: Path,
    integers: Mapping[str, Stored],
    *,
    kernel: Kernel = "integer",
    ranges: Mapping[str, tuple[float, int]] | None = None,
    unsigned: bool = False,
    accuracy_level: int = 0,
    smooth: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Write ``source`` with integers for weights; names, dimensions and metadata stay as they are.

    With the kernel ``integer``, MatMul and Gemm become MatMulInteger and Attention becomes QAttention, both on
    activations rounded to uint8, one scale and zero point a tensor. A matrix with groups, and every matrix with
    the kernel ``blocks``, becomes MatMulNBits. A lookup of 8 bits becomes a lookup of integers times a lookup of
    scales, one of fewer bits a GatherBlockQuantized.

    Args:
        source: A float graph, fused by onnxruntime or not.
        target: The file to write.
        integers: The quantised weights of the checkpoint that ``source`` was exported from.
        kernel: For matrices.
        ranges: Weight -> fixed scale and zero point of the activations that it is multiplied by; those of other
            weights are found at run time.
        unsigned: Integers of matrices as uint8 with zero point 128.
        smooth: Weight -> what its input (..., I) is multiplied by first. ``source`` holds the product of both.
        accuracy_level: Of MatMulNBits: 0 keeps activations in float, 4 rounds them to 8 bits block by block.

    Returns:
        ``int8``: operator -> how many of them hold integers now; ``float``: names of the weights that
        are integers in the checkpoint but stay float here, because the graph uses them in another operator,
        inside one that also holds a float weight, or not at all; ``largest``: the largest magnitude of an
        integer that is multiplied by activations; ``stored`` and ``executed``: in words, how many weights.
    """
    model, weights = files.view(source)
    rewriter = Rewriter(model.graph, weights, integers, kernel, ranges or {}, unsigned, accuracy_level)
    rewriter.smooth_by(smooth or {})
    rewriter.run()
    return rewriter.save(model, target)


class Rewriter(packed.Unpacking):
    """One graph that is being rewritten; see :func:`quantise_graph` for what its parts mean."""

    def __init__(
        self,
        graph: GraphProto,
        weights: Mapping[str, np.ndarray],
        integers: Mapping[str, Stored],
        kernel: Kernel,
        ranges: Mapping[str, tuple[float, int]],
        unsigned: bool,
        accuracy_level: int,
    ) -> None:
        self.graph, self.weights = graph, weights
        self.integers = integers
        self.kernel, self.ranges, self.unsigned = kernel, ranges, unsigned
        self.accuracy_level = accuracy_level
        self.floats = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.names: dict[bytes, list[str]] = {}
        for name, weight in integers.items():
            self.names.setdefault(_digest(weight.dense()), []).append(name)
        self.counts: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.executed: Counter[str] = Counter()
        self.placed: set[str] = set()
        self._whose: dict[tuple[str, int], str] = {}
        self.largest = 0
        self.foreign = False
        self.nodes: list[NodeProto] = []
        self._rounded: dict[tuple[str, tuple[float, int] | None], list[str]] = {}
        self._made: dict[tuple[str, str], tuple[str, ...]] = {}
        self.smooth: Mapping[str, np.ndarray] = {}
        self.pack = False

    def smooth_by(self, smooth: Mapping[str, np.ndarray]) -> None:
        """Look for these weights times their vectors (I,), and multiply what they read instead."""
        self.smooth = smooth
        for name, vector in smooth.items():
            if name in self.integers:
                dense = self.integers[name].dense()
                self.names[_digest(dense)].remove(name)
                self.names.setdefault(_digest(dense * vector), []).append(name)

    def run(self) -> None:
        """Rewrite every node that can be; the nodes keep their order, so the graph stays sorted."""
        rewrite = self.rewrites()
        for node in self.graph.node:
            if node.op_type not in rewrite or not rewrite[node.op_type](node):
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input} | {o.name for o in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)

    def rewrites(self) -> dict[str, Callable[[NodeProto], bool]]:
        """Operator -> what rewrites it; it returns False for a node that stays as it is."""
        return {
            "MatMul": self._matmul,
            "Gemm": self._gemm,
            "Attention": self._attention,
            "Gather": self._gather,
        }

    def save(self, model: ModelProto, target: Path) -> dict[str, Any]:
        """Write the model whose graph was rewritten; returns what :func:`quantise_graph` does."""
        if self.foreign and "com.microsoft" not in {entry.domain for entry in model.opset_import}:
            model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        files.save(model, target, weights=self.weights)
        return {
            "int8": dict(sorted(self.counts.items())),
            "float": sorted(set(self.integers) - self.placed),
            "largest": self.largest,
            "stored": dict(sorted(self.stored.items())),
            "executed": dict(sorted(self.executed.items())),
        }

    def _matmul(self, node: NodeProto) -> bool:
        found = self._find(node, 1, transposed=True)
        if found is None:
            return False
        self._product(node, node.input[0], node.input[1], found, node.output[0])
        self.counts["matmul"] += 1
        return True

    def _gemm(self, node: NodeProto) -> bool:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if not plain or attributes.get("transA"):
            return False
        found = self._find(node, 1, transposed=not attributes.get("transB"))
        if found is None:
            return False
        bias = node.input[2] if len(node.input) > 2 else ""
        product = f"{node.output[0]}_product" if bias else node.output[0]
        self._product(node, node.input[0], node.input[1], found, product)
        if bias:
            self._add("Add", [product, bias], node.output[0])
        self.counts["gemm"] += 1
        return True

    def _attention(self, node: NodeProto) -> bool:
        extra = [name for name in node.input[_ATTENTION_INPUTS:] if name]
        if extra or len(node.output) > 1 or not {a.name for a in node.attribute} <= _ATTENTION_ATTRIBUTES:
            return False
        tensor = self.floats.get(node.input[1])
        if tensor is None or len(node.input) < 3 or not node.input[2]:
            return False
        # Query, key and value stand side by side in (I, 3 O).
        thirds = np.split(files.values(tensor, self.weights), 3, axis=1)
        equal = [self.names.get(_digest(part.T), []) for part in thirds]
        if not all(equal) or any(not self._plain(self.integers[names[0]]) for names in equal):
            return False
        found = [self._layer_of(node, place, names) for place, names in enumerate(equal)]
        parts = [self.integers[name] for name in found]
        vectors = [self.smooth.get(name) for name in found]
        if any(not np.array_equal(_or_empty(v), _or_empty(vectors[0])) for v in vectors):
            return False
        weight = Stored(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.scale for part in parts]),
            bits=max(part.bits for part in parts),
        )
        stored = self._matrix(node.input[1], weight)
        rounded, scale_in, zero = self._round(
            self._smoothed(node.input[0], found[0]), self.ranges.get(found[0])
        )
        mask = node.input[3] if len(node.input) > 3 else ""
        inputs = [rounded, stored[0], node.input[2], scale_in, stored[1], mask, zero, *stored[2:]]
        made = self._add("QAttention", inputs, node.output[0], domain="com.microsoft")
        made.attribute.extend(node.attribute)
        for names in equal:
            self.placed.update(names)
        self._count(self._held(weight), f"{self._input_kind(found[0])} by 8-bit products", weight)
        self.counts["attention"] += 1
        return True

    def _gather(self, node: NodeProto) -> bool:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        name = self._find(node, 0, transposed=False) if axis == 0 else None
        if name is None:
            return False
        weight, output, index = self.integers[name], node.output[0], node.input[1]
        if weight.values.shape[1] % (8 // PACKED_BITS[weight.bits]):
            self.placed.discard(name)  # rows that fill no whole bytes have no operator
            return False
        if self._packs(weight, table=True):
            self._packed_lookup(node, weight)
            self._count(self._held(weight, table=True), "float, looked up", weight)
        elif self._plain(weight) and weight.bits > 4:
            table = self._table(node.input[0], weight)
            self._add("Gather", [table[0], index], f"{output}_integers")
            self._add("Cast", [f"{output}_integers"], f"{output}_cast", to=TensorProto.FLOAT)
            self._add("Gather", [table[1], index], f"{output}_scales")
            self._add("Mul", [f"{output}_cast", f"{output}_scales"], output)
            self._count("int8", "float, looked up", weight)
        else:
            stored, bits, block = self._blocks(node.input[0], weight, table=True)
            self._add(
                "GatherBlockQuantized",
                [stored[0], index, *stored[1:]],
                output,
                domain="com.microsoft",
                gather_axis=0,
                quantize_axis=1,
                block_size=block,
                bits=bits,
            )
            self._count(f"int{bits} in blocks of {block}", "float, looked up", weight)
        self.counts["gather"] += 1
        return True

    def _product(self, node: NodeProto, activation: str, initialiser: str, found: str, output: str) -> None:
        """(..., I) times (I, O)."""
        weight, name = self.integers[found], node.output[0]
        activation = self._smoothed(activation, found)
        if self.kernel == "blocks" or not self._plain(weight):
            stored, bits, block = self._blocks(initialiser, weight, table=False)
            self._add(
                "MatMulNBits",
                [activation, *stored],
                output,
                domain="com.microsoft",
                K=weight.values.shape[1],
                N=weight.values.shape[0],
                bits=bits,
                block_size=block,
                accuracy_level=self.accuracy_level,
            )
            how = "8 bits block by block" if self.accuracy_level == 4 else "float"
            self._count(f"int{bits} in blocks of {block}", f"{how}, MatMulNBits", weight)
            return
        # The pattern that onnxruntime merges into one DynamicQuantizeMatMul.
        stored = self._matrix(initialiser, weight)
        rounded, scale, zero = self._round(activation, self.ranges.get(found))
        self._add("MatMulInteger", [rounded, stored[0], zero, *stored[2:]], f"{name}_sum")
        self._add("Cast", [f"{name}_sum"], f"{name}_cast", to=TensorProto.FLOAT)
        self._add("Mul", [scale, stored[1]], f"{name}_scale")
        self._add("Mul", [f"{name}_cast", f"{name}_scale"], output)
        self._count(self._held(weight), f"{self._input_kind(found)} by 8-bit products", weight)

    def _smoothed(self, activation: str, found: str) -> str:
        """Name of an activation times the vector of the weight that reads it, once for all who share it."""
        if (vector := self.smooth.get(found)) is None:
            return activation
        key = ("smooth", f"{activation} {hashlib.blake2b(vector.tobytes()).hexdigest()}")
        if key not in self._made:
            output = f"{activation}_smooth_{len(self._made)}"
            self._initialise(f"{output}_by", vector.astype(np.float32))
            self._add("Mul", [activation, f"{output}_by"], output)
            self._made[key] = (output,)
        return self._made[key][0]

    def _input_kind(self, name: str) -> str:
        return "fixed ranges," if name in self.ranges else "ranges found at run time,"

    def _round(self, activation: str, fixed: tuple[float, int] | None) -> list[str]:
        """Round an activation once, however many products use it; names of integers, scale and zero point."""
        if (activation, fixed) not in self._rounded:
            suffix = "" if fixed is None else f"_{len(self._rounded)}"
            names = [f"{activation}_{part}{suffix}" for part in ("uint8", "uint8_scale", "uint8_zero")]
            if fixed is None:
                self.nodes.append(
                    helper.make_node("DynamicQuantizeLinear", [activation], names, name=f"{activation}_round")
                )
            else:
                self._initialise(names[1], np.array(fixed[0], dtype=np.float32))
                self._initialise(names[2], np.array(fixed[1], dtype=np.uint8))
                self._add("QuantizeLinear", [activation, names[1], names[2]], names[0])
            self._rounded[activation, fixed] = names
        return self._rounded[activation, fixed]

    def _find(self, node: NodeProto, place: int, *, transposed: bool) -> str | None:
        """The quantised weight that an input of a node equals; None when it stays float.

        Args:
            node: Who reads it.
            place: Which of its inputs.
            transposed: The graph holds (I, O) where the checkpoint holds (O, I).
        """
        tensor = self.floats.get(node.input[place])
        if tensor is None:
            return None
        dense = files.values(tensor, self.weights)
        names = self.names.get(_digest(dense.T if transposed else dense))
        if not names:
            return None
        self.placed.update(names)
        return self._layer_of(node, place, names)

    def _layer_of(self, node: NodeProto, place: int, names: list[str]) -> str:
        """Which of several equal weights a node reads: their ranges and factors differ though the integers do not.

        The exporter calls a node after its module; a fused one has lost that name, and gets the first weight
        that no node before it has, because both stand in the order of the model.
        """
        key = (node.output[0], place)
        if key not in self._whose:
            scope = node.name.replace("/", ".")
            named = [name for name in names if f".{name.removesuffix('weight')}" in scope]
            taken = set(self._whose.values())
            self._whose[key] = next(iter(named or (name for name in names if name not in taken)), names[0])
        return self._whose[key]

    @staticmethod
    def _plain(weight: Stored) -> bool:
        """Whether a row has one scale and the zero point 0, as kernels for integers want it."""
        return weight.zero is None and weight.scale.shape[1] == 1

    def _matrix(self, name: str, weight: Stored) -> tuple[str, ...]:
        """Integers (I, O), scales (O,), and with ``unsigned`` a zero point, as initialisers, once."""
        if ("matrix", name) not in self._made:
            made = [f"{name}_int8", f"{name}_int8_scale"]
            values = np.ascontiguousarray(weight.values.T)
            if self._packs(weight):
                self._unpacked(made[0], values, weight.bits)
            else:
                if self.unsigned:
                    values = (values.view(np.uint8)) ^ 0x80
                    made.append(f"{name}_int8_zero")
                    self._initialise(made[2], np.array(128, dtype=np.uint8))
                self._initialise(made[0], values)
            self._initialise(made[1], np.ascontiguousarray(weight.scale[:, 0]))
            self._made["matrix", name] = tuple(made)
            largest = int(np.abs(weight.values.astype(np.int16)).max(initial=0))
            self.largest = max(self.largest, largest)
        return self._made["matrix", name]

    def _table(self, name: str, weight: Stored) -> tuple[str, ...]:
        """Integers (V, D) and scales (V, 1) as initialisers, once."""
        if ("table", name) not in self._made:
            made = (f"{name}_int8_table", f"{name}_int8_table_scale")
            self._initialise(made[0], weight.values)
            self._initialise(made[1], weight.scale)
            self._made["table", name] = made
        return self._made["table", name]

    def _blocks(self, name: str, weight: Stored, *, table: bool) -> tuple[tuple[str, ...], int, int]:
        """Packed integers, scales and zero points as initialisers, once; with their bits and block size."""
        bits, columns = PACKED_BITS[weight.bits], weight.values.shape[1]
        block = _block_of(columns, weight.scale.shape[1])
        key = ("blocks-table" if table else "blocks", name)
        if key not in self._made:
            made = [f"{name}_int{bits}", f"{name}_int{bits}_scale"]
            blocks = -(-columns // block)
            offset = 1 << (bits - 1)
            raw = (weight.values.astype(np.int16) + offset).astype(np.uint8)
            if not table:
                # The product reads whole blocks: what pads the last one is multiplied by nothing.
                raw = np.pad(raw, ((0, 0), (0, blocks * block - columns)), constant_values=offset)
            stored = packed.pack(raw, bits)
            self._initialise(made[0], stored if table else stored.reshape(len(raw), blocks, -1))
            repeats = blocks // weight.scale.shape[1]
            self._initialise(made[1], np.repeat(weight.scale, repeats, axis=1))
            if weight.zero is not None:
                zero = np.repeat((weight.zero.astype(np.int16) + offset).astype(np.uint8), repeats, axis=1)
                per_byte = 8 // bits
                zero = np.pad(zero, ((0, 0), (0, -zero.shape[1] % per_byte)), constant_values=offset)
                made.append(f"{name}_int{bits}_zero")
                self._initialise(made[2], packed.pack(zero, bits))
            self._made[key] = tuple(made)
        return self._made[key], bits, block

    def _count(self, stored: str, executed: str, weight: Stored) -> None:
        self.stored[stored] += weight.values.size
        self.executed[executed] += weight.values.size

    def _initialise(self, name: str, array: np.ndarray) -> None:
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        node = helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes)
        self.foreign = self.foreign or node.domain == "com.microsoft"
        self.nodes.append(node)
        return node


def _block_of(columns: int, groups: int) -> int:
    """Columns of a block: those of a group, or when a row has one scale, the widest block that wastes little."""
    if groups > 1:
        return columns // groups
    block = _WIDEST
    while block > _NARROWEST and columns % block:
        block //= 2
    return block


def _or_empty(vector: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if vector is None else vector


def _digest(dense: np.ndarray) -> bytes:
    """A key for the content of a matrix: its shape and its bits."""
    content = np.ascontiguousarray(dense, dtype=np.float32)
    return hashlib.blake2b(content.reshape(-1).data, salt=len(content).to_bytes(8, "little")).digest()
