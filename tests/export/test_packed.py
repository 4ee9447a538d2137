"""Few bits in the file, 8-bit products when it runs: operators that every runtime has do the unpacking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from kdcli.export import int8, packed, qdq
from kdcli.export.int8 import Stored
from tests.export.test_qdq import RANGE, graph, ran, rounded

STANDARD = {
    "Cast",
    "Gather",
    "Reshape",
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMul",
    "Mul",
    "Shape",
    "Concat",
}


def few(bits: int, rows: int, columns: int) -> Stored:
    rng = np.random.default_rng(bits)
    values = rng.choice([-1, 1] if bits == 1 else [-1, 0, 1], (rows, columns)).astype(np.int8)
    return Stored(values, rng.uniform(0.01, 0.02, (rows, 1)).astype(np.float32), None, bits)


@pytest.mark.parametrize("bits", packed.UNPACKED)
def test_every_byte_stands_for_what_was_packed_into_it(bits: int) -> None:
    allowed = [-1, 1] if bits == 1 else range(-(1 << (bits - 1)), 1 << (bits - 1))
    values = np.random.default_rng(0).choice(list(allowed), (5, 48)).astype(np.int8)
    stored = packed.pack(packed.codes(values, bits), bits)
    assert stored.shape == (5, 48 * bits // 8)
    assert np.array_equal(packed.meaning(bits)[stored].reshape(5, 48), values)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_packed_product_runs_as_integers(bits: int, tmp_path: Path) -> None:
    weight, x = few(bits, 16, 8), np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32) * 2
    source = graph(
        tmp_path / "a.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weight.dense().T},
        ["n", 8],
    )
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": weight}, {"w": RANGE}, pack=True)
    assert detail["stored"] == {f"int{bits}, packed": 128}
    assert detail["executed"] == {"fixed ranges, by 8-bit products": 128}
    made = onnx.load(str(tmp_path / "b.onnx"))
    onnx.checker.check_model(made, full_check=True)
    assert {node.op_type for node in made.graph.node} <= STANDARD
    assert not any(node.domain for node in made.graph.node)
    held = next(t for t in made.graph.initializer if t.name.endswith("_bytes"))
    assert len(held.raw_data) == 128 * bits // 8
    (got,), operators = ran(tmp_path / "b.onnx", tmp_path, x)
    assert operators == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}  # unpacked when it was loaded
    assert np.allclose(got, rounded(x, RANGE) @ weight.dense().T, rtol=0, atol=1e-5)


def test_rows_that_fill_no_whole_bytes_are_stored_as_bytes(tmp_path: Path) -> None:
    weight = few(2, 6, 8)  # 6 outputs lie in one and a half bytes
    source = graph(
        tmp_path / "a.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weight.dense().T},
        ["n", 8],
    )
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": weight}, {"w": RANGE}, pack=True)
    assert detail["stored"] == {"int8": 48}
    x = np.ones((1, 8), np.float32)
    (got,), _ = ran(tmp_path / "b.onnx", tmp_path, x)
    assert np.allclose(got, rounded(x, RANGE) @ weight.dense().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [[3], [2, 3]])
def test_a_packed_table_is_looked_up_bit_for_bit(shape: list[int], tmp_path: Path) -> None:
    weight = few(2, 10, 12)
    source = graph(
        tmp_path / "a.onnx",
        [
            helper.make_node("Cast", ["x"], ["ids"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["w", "ids"], ["y"]),
        ],
        {"w": weight.dense()},
        ["n"] * len(shape),
    )
    detail = int8.quantise_graph(source, tmp_path / "b.onnx", {"w": weight}, kernel="blocks")
    assert detail["stored"] == {"int2, packed": 120}
    ids = np.random.default_rng(0).integers(0, 10, shape)
    made = onnx.load(str(tmp_path / "b.onnx"))
    del made.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(made, str(tmp_path / "b.onnx"))
    assert {node.op_type for node in made.graph.node} <= STANDARD
    (got,), _ = ran(tmp_path / "b.onnx", tmp_path, ids.astype(np.float32))
    assert np.array_equal(got, weight.dense()[ids])
