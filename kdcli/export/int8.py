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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Integers = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name of a weight -> its integers (O, I) int8 and its scales (O, 1) float32."""

# What QAttention can do of what Attention can; anything else stays a float operator.
_ATTENTION_ATTRIBUTES = frozenset({"num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary"})
_ATTENTION_INPUTS = 4  # input, weights, bias, mask


def quantise_graph(source: Path, target: Path, integers: Integers) -> dict[str, Any]:
    """Write ``source`` with integers for weights; names, dimensions and metadata stay as they are.

    MatMul and Gemm become MatMulInteger, Attention becomes QAttention (both on activations rounded by
    DynamicQuantizeLinear: uint8, one scale and zero point a tensor), and a lookup becomes a lookup of
    integers times a lookup of scales.

    Args:
        source: A float graph, fused by onnxruntime or not.
        target: The file to write.
        integers: The quantised weights of the checkpoint that ``source`` was exported from.

    Returns:
        ``int8``: operator -> how many of them hold integers now; ``float``: names of the weights that
        are integers in the checkpoint but stay float here, because the graph uses them in another operator,
        inside one that also holds a float weight, or not at all; ``largest``: the largest magnitude of an
        integer that is multiplied by activations.
    """
    model = onnx.load(str(source))
    rewriter = _Rewriter(model.graph, integers)
    rewriter.run()
    onnx.save(model, str(target))
    return {
        "int8": dict(sorted(rewriter.counts.items())),
        "float": sorted(set(integers) - rewriter.placed),
        "largest": rewriter.largest,
    }


class _Rewriter:
    def __init__(self, graph: GraphProto, integers: Integers) -> None:
        self.graph = graph
        self.integers = integers
        self.floats = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.names: dict[bytes, list[str]] = {}
        for name, (values, scale) in integers.items():
            self.names.setdefault(_digest(values.astype(np.float32) * scale), []).append(name)
        self.counts: Counter[str] = Counter()
        self.placed: set[str] = set()
        self.largest = 0
        self.nodes: list[NodeProto] = []
        self._rounded: dict[str, list[str]] = {}  # activation -> its integers, scale and zero point
        self._stored: dict[tuple[str, bool], tuple[str, str]] = {}

    def run(self) -> None:
        """Rewrite every node that can be; the nodes keep their order, so the graph stays sorted."""
        rewrite = {
            "MatMul": self._matmul,
            "Gemm": self._gemm,
            "Attention": self._attention,
            "Gather": self._gather,
        }
        for node in self.graph.node:
            if node.op_type not in rewrite or not rewrite[node.op_type](node):
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input} | {o.name for o in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)

    def _matmul(self, node: NodeProto) -> bool:
        weight = self._weight(node.input[1], transposed=True)
        if weight is None:
            return False
        self._product(node, node.input[0], weight, node.output[0])
        self.counts["matmul"] += 1
        return True

    def _gemm(self, node: NodeProto) -> bool:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if not plain or attributes.get("transA"):
            return False
        weight = self._weight(node.input[1], transposed=not attributes.get("transB"))
        if weight is None:
            return False
        bias = node.input[2] if len(node.input) > 2 else ""
        product = f"{node.output[0]}_product" if bias else node.output[0]
        self._product(node, node.input[0], weight, product)
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
        found = [self._find(part.T) for part in np.split(numpy_helper.to_array(tensor), 3, axis=1)]
        parts = [self.integers[names[0]] for names in found if names]
        if len(parts) < 3:
            return False
        for names in found:
            self.placed.update(names)
        values, scale = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        stored = self._store(node.input[1], values, scale)
        rounded, scale_in, zero = self._round(node.input[0])
        mask = node.input[3] if len(node.input) > 3 else ""
        inputs = [rounded, stored[0], node.input[2], scale_in, stored[1], mask, zero]
        made = self._add("QAttention", inputs, node.output[0], domain="com.microsoft")
        made.attribute.extend(node.attribute)
        self.counts["attention"] += 1
        return True

    def _gather(self, node: NodeProto) -> bool:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        weight = self._weight(node.input[0], transposed=False, table=True) if axis == 0 else None
        if weight is None:
            return False
        output, index = node.output[0], node.input[1]
        self._add("Gather", [weight[0], index], f"{output}_integers")
        self._add("Cast", [f"{output}_integers"], f"{output}_cast", to=TensorProto.FLOAT)
        self._add("Gather", [weight[1], index], f"{output}_scales")
        self._add("Mul", [f"{output}_cast", f"{output}_scales"], output)
        self.counts["gather"] += 1
        return True

    def _product(self, node: NodeProto, activation: str, weight: tuple[str, str], output: str) -> None:
        """(..., I) times (I, O); the pattern that onnxruntime merges into one DynamicQuantizeMatMul."""
        rounded, scale, zero = self._round(activation)
        name = node.output[0]
        self._add("MatMulInteger", [rounded, weight[0], zero], f"{name}_sum")
        self._add("Cast", [f"{name}_sum"], f"{name}_cast", to=TensorProto.FLOAT)
        self._add("Mul", [scale, weight[1]], f"{name}_scale")
        self._add("Mul", [f"{name}_cast", f"{name}_scale"], output)

    def _round(self, activation: str) -> list[str]:
        """Round an activation once, however many products use it."""
        if activation not in self._rounded:
            names = [f"{activation}_{part}" for part in ("uint8", "uint8_scale", "uint8_zero")]
            self.nodes.append(
                helper.make_node("DynamicQuantizeLinear", [activation], names, name=f"{activation}_round")
            )
            self._rounded[activation] = names
        return self._rounded[activation]

    def _weight(self, name: str, *, transposed: bool, table: bool = False) -> tuple[str, str] | None:
        """Names of the integers and scales that replace a float weight; None when it stays float.

        Args:
            name: An input of a node.
            transposed: The graph holds (I, O) where the checkpoint holds (O, I).
            table: A lookup: the integers stay (O, I) and the scales (O, 1).
        """
        tensor = self.floats.get(name)
        if tensor is None:
            return None
        dense = numpy_helper.to_array(tensor)
        if not (names := self._find(dense.T if transposed else dense)):
            return None
        self.placed.update(names)
        return self._store(name, *self.integers[names[0]], table=table)

    def _find(self, dense: np.ndarray) -> list[str]:
        return self.names.get(_digest(dense), [])

    def _store(
        self, name: str, values: np.ndarray, scale: np.ndarray, *, table: bool = False
    ) -> tuple[str, str]:
        """Add integers and scales of (O, I) as initialisers in the layout of their operator, once."""
        if (name, table) not in self._stored:
            suffix = "int8_table" if table else "int8"
            names = (f"{name}_{suffix}", f"{name}_{suffix}_scale")
            matrix, scales = (values, scale) if table else (values.T, scale[:, 0])
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), names[0]))
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(scales), names[1]))
            self._stored[name, table] = names
            if not table:
                self.largest = max(self.largest, int(np.abs(values.astype(np.int16)).max(initial=0)))
        return self._stored[name, table]

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        node = helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes)
        self.nodes.append(node)
        return node


def _digest(dense: np.ndarray) -> bytes:
    """A key for the content of a matrix: its shape and its bits."""
    content = np.ascontiguousarray(dense, dtype=np.float32)
    return hashlib.blake2b(content.tobytes(), salt=len(content).to_bytes(8, "little")).digest()
