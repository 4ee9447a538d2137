"""Attention whose projections are no single products, as one operator of onnxruntime.

Its optimiser looks for three products of one tensor. Factors, and layers of which only some are factorised, are none;
what stands between the projections and the output is the same, and ``MultiHeadAttention`` takes it from there:

    softmax(scale Q K^T + mask) V

Shape letters: B rows, T tokens, D features of all heads.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_DOMAIN = "com.microsoft"
_TO_HEADS = [0, 2, 1, 3]  # (B, T, H, D / H) <-> (B, H, T, D / H)
_TO_KEYS = [0, 2, 3, 1]


class _Different(Exception):
    """What is there is not that kind of attention."""


@dataclass
class _Reader:
    graph: GraphProto
    makers: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto]] = field(default_factory=lambda: defaultdict(list))
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tensor in self.graph.initializer:
            if np.prod(tensor.dims) <= 1:
                self.constants[tensor.name] = tensor
        for node in self.graph.node:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers[name].append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def maker(self, name: str, *kinds: str) -> NodeProto:
        node = self.makers.get(name)
        if node is None or node.op_type not in kinds:
            raise _Different
        return node

    def only_reader(self, name: str, kind: str) -> NodeProto:
        found = self.readers[name]
        if len(found) != 1 or found[0].op_type != kind:
            raise _Different
        return found[0]

    def scalar(self, name: str) -> float:
        if name not in self.constants or (value := numpy_helper.to_array(self.constants[name])).size != 1:
            raise _Different
        return float(value.flat[0])

    def transposed(self, name: str, order: list[int]) -> str:
        node = self.maker(name, "Transpose")
        if list(node.attribute[0].ints) != order:
            raise _Different
        return node.input[0]

    def heads(self, name: str) -> tuple[str, int, int]:
        """The (B, T, D) tensor behind one with heads, their number and their size."""
        node = self.maker(name, "Reshape")
        shape = self.maker(node.input[1], "Concat")
        if len(shape.input) != 4:
            raise _Different
        return node.input[0], int(self.scalar(shape.input[2])), int(self.scalar(shape.input[3]))


def fuse(graph: GraphProto) -> int:
    """Replace every attention of that kind, in place; what led to it is left behind, for the caller to prune.

    Returns:
        How many there were.
    """
    found = _Reader(graph)
    made = []
    for node in graph.node:
        if node.op_type == "Softmax":
            with suppress(_Different):
                made.append(_fused(found, node))
    for last, fused in made:
        last.CopyFrom(fused)
    return len(made)


def _fused(found: _Reader, softmax: NodeProto) -> tuple[NodeProto, NodeProto]:
    """The node that gives an attention's (B, T, D) output, and what replaces it.

    Raises:
        _Different: It is put together in another way.
    """
    masked = found.maker(softmax.input[0], "Add")
    scaled = found.maker(masked.input[0], "Mul", "Div")
    scale = found.scalar(scaled.input[1])
    product = found.maker(scaled.input[0], "MatMul")
    query, count, size = found.heads(found.transposed(product.input[0], _TO_HEADS))
    key, *of_key = found.heads(found.transposed(product.input[1], _TO_KEYS))
    weighted = found.only_reader(softmax.output[0], "MatMul")
    value, *of_value = found.heads(found.transposed(weighted.input[1], _TO_HEADS))
    if count < 1 or of_key != [count, size] or of_value != [count, size]:
        raise _Different
    back = found.only_reader(weighted.output[0], "Transpose")
    found.transposed(back.output[0], _TO_HEADS)
    last = found.only_reader(back.output[0], "Reshape")
    if len(found.maker(last.input[1], "Concat").input) != 3:
        raise _Different
    return last, helper.make_node(
        "MultiHeadAttention",
        [query, key, value, "", "", masked.input[1]],
        [last.output[0]],
        name=f"{softmax.name}_fused",
        domain=_DOMAIN,
        num_heads=count,
        scale=1 / scale if scaled.op_type == "Div" else scale,
    )
