"""The oldest onnxruntime that runs a graph, as it was measured.

``benchmarks/onnxruntime_versions.py`` opened and ran the graph of every scheme and setting in the last release of
each minor version from 1.15 to 1.26 and of every second one up to 1.32, on the processor, and compared the answers
with those of the newest one. What it found depends on few operators. All graphs have opset 17 and IR version 8,
which every one of those versions reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OLDEST = "1.15"
"""The oldest version that was tried."""

NEWEST = "1.32"
"""The newest version that was tried."""

PACKED_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits of an integer in the checkpoint -> in the operators of onnxruntime that read packed weights."""

NEEDS = {
    "MatMulNBits, 4 bits": "1.17",
    "MatMulNBits, 8 bits": "1.23",
    "MatMulNBits, 2 bits": "1.24",
    "GatherBlockQuantized, 4 bits": "1.23",
    "GatherBlockQuantized, 2 bits": "1.28",
    "MultiHeadAttention with a mask to add": "1.20",
}
"""Operator -> the oldest version that runs it; all others that kdcli writes run in :data:`OLDEST`."""

_OPSET, _IR = 17, 8


def oldest(operators: Iterable[str]) -> str:
    """The oldest version that runs all of these; names that :data:`NEEDS` does not have need nothing.

    >>> oldest(["MatMulNBits, 4 bits", "GatherBlockQuantized, 4 bits"]), oldest([])
    ('1.23', '1.15')
    """
    return max((NEEDS.get(name, OLDEST) for name in operators), key=_order, default=OLDEST)


def of_graph(model: Any) -> str | None:
    """The oldest version that runs an ``onnx.ModelProto``; None where it has a form that was not measured."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("", _OPSET) > _OPSET or model.ir_version > _IR:
        return None
    return oldest(_named(node) for node in model.graph.node if node.domain == "com.microsoft")


def _named(node: Any) -> str:
    if node.op_type == "MultiHeadAttention":
        return "MultiHeadAttention with a mask to add" if any(node.input[5:6]) else node.op_type
    bits = next((a.i for a in node.attribute if a.name == "bits"), None)
    return str(node.op_type) if bits is None else f"{node.op_type}, {bits} bits"


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
