"""From a float ONNX graph to one with fixed ranges: QuantizeLinear and DequantizeLinear around products.

Every input of a product becomes Q(x) -> DQ, every weight DQ(integers), and onnxruntime merges these with the
product between them when it loads the file. What runs then (onnxruntime 1.32, processor):

    MatMul     MatMulIntegerToFloat   uint8 by int8, summed in 32 bits, the scales applied at the end
    Gemm       QGemm                  the same with its bias in 32 bits; it wants a zero point beside the weights
    Attention  QAttention             written as such, because no pattern of Q and DQ leads to it
    Conv       QLinearConv            integers go in and come out, so its output has a range as well

Outputs of the other products stay float. Layer norms, GELU, residual sums and softmax are not touched unless
asked for: their outputs have outliers that eight bits with one scale a tensor cannot hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from kdcli.export import files
from kdcli.export.int8 import Range, Rewriter, Stored, _digest

_INT32_MAX = 2**31 - 1

OPERATORS = ("layernorm", "gelu", "add", "softmax")
"""What is rounded only when asked for."""
_OWN_OPERATORS = {"LayerNormalization": "layernorm", "Softmax": "softmax"}


def quantise_graph(
    source: Path,
    target: Path,
    integers: Mapping[str, Stored],
    ranges: Mapping[str, Range],
    *,
    outputs: Mapping[str, Range] | None = None,
    unsigned: bool = False,
    smooth: Mapping[str, np.ndarray] | None = None,
    tensors: Mapping[str, Range] | None = None,
    pack: bool = False,
) -> dict[str, Any]:
    """Write ``source`` with integers for weights and fixed ranges for what they are multiplied by.

    Args:
        source: A float graph, fused by onnxruntime or not.
        target: The file to write.
        integers: The quantised weights of the checkpoint that ``source`` was exported from; those of a
            convolution as (O, I K).
        ranges: Weight -> scale and zero point (uint8) of what it is multiplied by. A product without one
            finds its range at run time; a convolution without one stays float.
        outputs: Weight of a convolution -> scale and zero point of its output.
        unsigned: Integers of matrices as uint8 with zero point 128.
        smooth: Weight -> what its input (..., I) is multiplied by first, before the range applies.
        tensors: Further tensors of ``source`` to round, such as those of :func:`outputs_of`.
        pack: Keep integers of few bits packed in the file.

    Returns:
        As :func:`kdcli.export.int8.quantise_graph`.
    """
    model, weights = files.view(source)
    rewriter = _Fixed(model.graph, weights, integers, "integer", ranges, unsigned, 0)
    rewriter.outputs = outputs or {}
    rewriter.smooth_by(smooth or {})
    rewriter.tensors = tensors or {}
    rewriter.pack = pack
    rewriter.run()
    return rewriter.save(model, target)


def outputs_of(source: Path, operators: Collection[str]) -> list[str]:
    """Names of the tensors in a graph without fusions that these :data:`OPERATORS` give, in its order."""
    graph = files.view(source)[0].graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    norms = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    found = []
    for node in graph.node:
        output = node.output[0] if node.output else ""
        if (name := _OWN_OPERATORS.get(node.op_type)) is not None:
            found += [output] if name in operators else []
        elif node.op_type == "Add" and output in norms and not constants & set(node.input):
            found += [output] if "add" in operators else []
        elif node.op_type == "Erf" and "gelu" in operators:
            # 0.5 x (1 + erf(x / sqrt(2))): the sum and the products behind the error function
            while len(after := readers.get(output, [])) == 1 and after[0].op_type in ("Add", "Mul"):
                output = after[0].output[0]
            found.append(output)
    return found


def showing(source: Path, target: Path, tensors: Sequence[str]) -> None:
    """Write ``source`` with these tensors as its outputs, to look at them."""
    model, weights = files.view(source)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in tensors)
    files.save(model, target, weights=weights)


class _Fixed(Rewriter):
    outputs: Mapping[str, Range]
    tensors: Mapping[str, Range]

    def run(self) -> None:
        """Rewrite every node that can be, convolutions too."""
        self.consumers = Counter(name for node in self.graph.node for name in node.input)
        self.readers = {name: node for node in self.graph.node for name in node.input}
        self.absorbed: set[str] = set()  # activation functions that went into the operator before them
        self._round_tensors()
        super().run()

    def _round_tensors(self) -> None:
        """Put a pair of Q and DQ behind whatever gives one of ``tensors``."""
        nodes = list(self.graph.node)
        del self.graph.node[:]
        for node in nodes:
            named = [i for i, name in enumerate(node.output) if name in self.tensors]
            outputs = [node.output[i] for i in named]
            for i, name in zip(named, outputs, strict=True):
                node.output[i] = f"{name}_float"
            self.graph.node.append(node)
            for name in outputs:
                scale, zero = self.tensors[name]
                self._initialise(f"{name}_step", np.array(scale, np.float32))
                self._initialise(f"{name}_origin", np.array(zero, np.uint8))
                parts = [f"{name}_step", f"{name}_origin"]
                for kind, inputs, output in (
                    ("QuantizeLinear", [f"{name}_float", *parts], f"{name}_rounded"),
                    ("DequantizeLinear", [f"{name}_rounded", *parts], name),
                ):
                    self.graph.node.append(helper.make_node(kind, inputs, [output], name=f"{output}_{kind}"))
                self.counts["rounded"] += 1

    def rewrites(self) -> dict[str, Any]:
        """Operator -> what rewrites it."""
        return super().rewrites() | {"Conv": self._conv, "Relu": self._relu}

    def _product(self, node: NodeProto, activation: str, initialiser: str, found: str, output: str) -> None:
        if found not in self.ranges or not self._plain(self.integers[found]):
            super()._product(node, activation, initialiser, found, output)
            return
        read = self._restored(self._smoothed(activation, found), self.ranges[found])
        weight = self._weight(initialiser, self.integers[found])
        self._add("MatMul", [read, weight], output)
        self._count(
            self._held(self.integers[found]),
            f"{self._input_kind(found)} by 8-bit products",
            self.integers[found],
        )

    def _gemm(self, node: NodeProto) -> bool:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        found = None
        if plain and not attributes.get("transA") and len(node.input) > 2 and node.input[2] in self.floats:
            found = self._find(node, 1, transposed=not attributes.get("transB"))
        bias = None if found is None else self._bias(node.input[2], found)
        if found is None or bias is None:
            return super()._gemm(node)
        read = self._restored(self._smoothed(node.input[0], found), self.ranges[found])
        weight = self._weight(node.input[1], self.integers[found])
        self._add("Gemm", [read, weight, bias], node.output[0])
        self._count(
            self._held(self.integers[found]),
            f"{self._input_kind(found)} by 8-bit products",
            self.integers[found],
        )
        self.counts["gemm"] += 1
        return True

    def _conv(self, node: NodeProto) -> bool:
        tensor = self.floats.get(node.input[1])
        if tensor is None:
            return False
        shape = tuple(tensor.dims)
        dense = files.values(tensor, self.weights).reshape(shape[0], -1)
        names = [n for n in self.names.get(_digest(dense), []) if n in self.ranges and n in self.outputs]
        if not names:
            return False
        found = self._layer_of(node, 1, names)
        bias = self._bias(node.input[2], found) if len(node.input) > 2 and node.input[2] else ""
        if bias is None:
            return False
        weight = self.integers[found]
        name = f"{node.input[1]}_int8"
        self._initialise(name, weight.values.reshape(shape))
        inputs = [self._restored(node.input[0], self.ranges[found])]
        inputs.append(self._dequantise(name, weight.scale[:, 0], axis=0))
        inputs += [bias] if bias else []
        output, scale, zero = node.output[0], *self.outputs[found]
        reader = self.readers.get(output)
        made, raw = output, f"{output}_float"
        if reader is not None and reader.op_type == "Relu" and self.consumers[output] == 1:
            # What is below zero is cut off, so all 256 integers serve what is above.
            made, raw = reader.output[0], f"{reader.output[0]}_float"
            scale, zero = float(np.float32((255 - zero) * scale / 255)) or 1.0, 0
            self.absorbed.add(made)
            self._copy(node, inputs, output)
            self._add("Relu", [output], raw)
        else:
            self._copy(node, inputs, raw)
        self._rounded_to(raw, made, (scale, zero))
        self.placed.update(names)
        self.largest = max(self.largest, int(np.abs(weight.values.astype(np.int16)).max(initial=0)))
        self._count("int8", f"{self._input_kind(found)} by 8-bit products", weight)
        self.counts["conv"] += 1
        return True

    def _relu(self, node: NodeProto) -> bool:
        return node.output[0] in self.absorbed

    def _copy(self, node: NodeProto, inputs: list[str], output: str) -> None:
        made = self._add(node.op_type, inputs, output)
        made.attribute.extend(node.attribute)

    def _rounded_to(self, source: str, target: str, fixed: Range) -> None:
        """``target`` = what is left of ``source`` after rounding it to uint8."""
        names = self._round(source, fixed)
        self._add("DequantizeLinear", names, target)

    def _restored(self, activation: str, fixed: Range) -> str:
        """Name of an activation, rounded and multiplied out again, once for all its readers."""
        names = self._round(activation, fixed)
        output = f"{names[0]}_restored"
        if ("restored", output) not in self._made:
            self._add("DequantizeLinear", names, output)
            self._made["restored", output] = (output,)
        return output

    def _weight(self, initialiser: str, weight: Stored) -> str:
        """Name of a matrix (I, O), multiplied out of its integers; a node of its own for every reader."""
        stored = self._matrix(initialiser, weight)
        return self._dequantise(stored[0], weight.scale[:, 0], axis=1, scale_name=stored[1])

    def _dequantise(self, integers: str, scale: np.ndarray, *, axis: int, scale_name: str = "") -> str:
        output = f"{integers}_dense_{len(self.nodes)}"
        made = [scale_name or f"{output}_scale", f"{output}_zero"]
        if not scale_name:
            self._initialise(made[0], scale)
        # A bias has the zero point 0 without saying so; a matrix must say it to be merged into a QGemm.
        zero = np.full(len(scale), 128, np.uint8) if self.unsigned and axis else np.zeros(len(scale), np.int8)
        self._initialise(made[1], zero)
        self._add("DequantizeLinear", [integers, *made], output, axis=axis)
        return output

    def _bias(self, name: str, found: str) -> str | None:
        """A bias in steps of what the integer sum counts; None when 32 bits cannot hold it."""
        if found not in self.ranges or name not in self.floats or not self._plain(self.integers[found]):
            return None
        bias = files.values(self.floats[name], self.weights)
        step = np.float32(self.ranges[found][0]) * self.integers[found].scale[:, 0]
        steps = np.round(bias.astype(np.float64) / step)
        if step.min() < np.finfo(np.float32).tiny or np.abs(steps).max(initial=0) > _INT32_MAX:
            return None
        stored, output = f"{name}_int32_{len(self.nodes)}", f"{name}_dense_{len(self.nodes)}"
        self._initialise(stored, steps.astype(np.int32))
        self._initialise(f"{stored}_scale", step)
        self._add("DequantizeLinear", [stored, f"{stored}_scale"], output, axis=0)
        return output
