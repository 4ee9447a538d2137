"""Graphs with fixed ranges, operator by operator, against the arithmetic in NumPy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdcli.export import qdq
from kdcli.export.int8 import Stored

RANGE = (0.03, 117)


def weight(rows: int = 5, columns: int = 8, seed: int = 0) -> Stored:
    rng = np.random.default_rng(seed)
    values = rng.integers(-64, 65, (rows, columns)).astype(np.int8)
    return Stored(values, rng.uniform(0.001, 0.02, (rows, 1)).astype(np.float32))


def rounded(x: np.ndarray, fixed: tuple[float, int]) -> np.ndarray:
    """QuantizeLinear and back, from the definition of ONNX."""
    scale, zero = np.float32(fixed[0]), fixed[1]
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def graph(
    path: Path, nodes: list, tensors: dict[str, np.ndarray], shape: list, outputs: tuple[str, ...] = ("y",)
) -> Path:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in tensors.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def ran(path: Path, work: Path, x: np.ndarray) -> tuple[list[np.ndarray], Counter[str]]:
    """Answers, and the operators that were left after onnxruntime merged what it could."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(work / "optimised.onnx")
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = Counter(n.op_type for n in onnx.load(str(work / "optimised.onnx")).graph.node)
    return session.run(None, {"x": x}), operators


X = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32) * 2


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_product_is_that_of_the_rounded_input(unsigned: bool, tmp_path: Path) -> None:
    w = weight()
    source = graph(
        tmp_path / "a.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.dense().T}, ["n", 8]
    )
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE}, unsigned=unsigned)
    (got,), operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert operators == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert np.allclose(got, rounded(X, RANGE) @ w.dense().T, rtol=0, atol=1e-5)  # integer sums are exact
    assert not np.allclose(got, X @ w.dense().T, rtol=0, atol=1e-3)
    assert (detail["int8"], detail["float"], detail["largest"]) == ({"matmul": 1}, [], 64)
    assert detail["executed"] == {"fixed ranges, by 8-bit products": 40}
    onnx.checker.check_model(onnx.load(str(tmp_path / "b.onnx")), full_check=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm_keeps_its_bias_in_32_bits(transposed: bool, tmp_path: Path) -> None:
    w, bias = weight(), np.linspace(-3, 3, 5).astype(np.float32)
    dense = w.dense() if transposed else w.dense().T
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(transposed))]
    source = graph(tmp_path / "a.onnx", nodes, {"w": dense, "b": bias}, ["n", 8])
    qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE})
    (got,), operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert operators == {"QuantizeLinear": 1, "QGemm": 1}
    # half a step of the bias on top
    step = np.float32(RANGE[0]) * w.scale[:, 0]
    assert (np.abs(got - (rounded(X, RANGE) @ w.dense().T + bias)) <= step / 2 + 1e-5).all()


def test_a_bias_that_32_bits_cannot_hold_stays_float(tmp_path: Path) -> None:
    w = weight()
    w.scale[2] = 1e-12
    bias = np.full(5, 4.0, np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    source = graph(tmp_path / "a.onnx", nodes, {"w": w.dense().T, "b": bias}, ["n", 8])
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE})
    (got,), _ = ran(tmp_path / "b.onnx", tmp_path, X)
    assert detail["float"] == []
    assert np.allclose(got, rounded(X, RANGE) @ w.dense().T + bias, rtol=0, atol=1e-5)


def test_a_product_without_a_range_finds_it_at_run_time(tmp_path: Path) -> None:
    w, v = weight(), weight(seed=2)
    nodes = [helper.make_node("MatMul", ["x", n], [o]) for n, o in (("w", "y"), ("v", "z"))]
    source = graph(tmp_path / "a.onnx", nodes, {"w": w.dense().T, "v": v.dense().T}, ["n", 8], ("y", "z"))
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w, "v": v}, {"w": RANGE})
    (got, other), operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert operators["MatMulIntegerToFloat"] == operators["DynamicQuantizeMatMul"] == 1
    assert np.allclose(got, rounded(X, RANGE) @ w.dense().T, rtol=0, atol=1e-5)
    low, high = min(X.min(), 0), max(X.max(), 0)
    own = (float(np.float32((high - low) / 255)), int(np.round(-low / np.float32((high - low) / 255))))
    assert np.allclose(other, rounded(X, own) @ v.dense().T, rtol=0, atol=1e-4)
    assert sum(detail["executed"].values()) == 80
    assert len(detail["executed"]) == 2


def test_an_input_is_rounded_once_for_all_who_read_it(tmp_path: Path) -> None:
    weights = {name: weight(seed=i) for i, name in enumerate("abc")}
    nodes = [helper.make_node("MatMul", ["x", n], [f"y{n}"]) for n in weights]
    tensors = {n: w.dense().T for n, w in weights.items()}
    source = graph(tmp_path / "a.onnx", nodes, tensors, ["n", 8], ("ya", "yb", "yc"))
    qdq.quantise_graph(source, tmp_path / "b.onnx", weights, dict.fromkeys(weights, RANGE))
    got, operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert operators == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 3}
    for answer, w in zip(got, weights.values(), strict=True):
        assert np.allclose(answer, rounded(X, RANGE) @ w.dense().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by order"])
@pytest.mark.parametrize("stored", ["once", "twice", "copied"])
def test_equal_weights_have_the_ranges_of_their_own_layers(named: bool, stored: str, tmp_path: Path) -> None:
    w, ranges = weight(), {"one.weight": RANGE, "two.weight": (0.011, 40)}
    order = ("two", "one") if named else ("one", "two")  # a graph that names its nodes may have any order
    second = {"once": "w", "twice": "v", "copied": "c"}[stored]
    nodes = [
        helper.make_node("MatMul", ["x", n], [layer], name=f"/model/{layer}/MatMul" if named else "")
        for layer, n in zip(order, ("w", second), strict=True)
    ]
    nodes = [helper.make_node("Identity", ["w"], ["c"]), *nodes] if stored == "copied" else nodes
    tensors = {"w": w.dense().T, **({"v": w.dense().T} if stored == "twice" else {})}
    source = graph(tmp_path / "a.onnx", nodes, tensors, ["n", 8], ("one", "two"))
    integers = {"one.weight": w, "two.weight": w}
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", integers, ranges)
    got, operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert detail["float"] == []
    assert operators == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2}
    for answer, fixed in zip(got, ranges.values(), strict=True):
        assert np.allclose(answer, rounded(X, fixed) @ w.dense().T, rtol=0, atol=1e-5)
    assert not np.allclose(*got, rtol=0, atol=1e-3)


def test_factors_are_applied_before_the_rounding(tmp_path: Path) -> None:
    w = weight()
    factors = np.linspace(0.25, 4, 8).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = graph(tmp_path / "a.onnx", nodes, {"w": (w.dense() * factors).T}, ["n", 8])
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE}, smooth={"w": factors})
    (got,), operators = ran(tmp_path / "b.onnx", tmp_path, X)
    assert detail["float"] == []
    assert operators["Mul"] == 1
    assert np.allclose(got, rounded(X * factors, RANGE) @ w.dense().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution_gives_integers(relu: bool, biased: bool, tmp_path: Path) -> None:
    w = weight(4, 3 * 2)
    filters = w.dense().reshape(4, 3, 2)
    bias = np.array([0.3, -0.2, 0.1, 0.0], np.float32)
    nodes = [helper.make_node("Conv", ["x", "w", *(["b"] if biased else [])], ["c" if relu else "y"])]
    nodes += [helper.make_node("Relu", ["c"], ["y"])] if relu else []
    source = graph(
        tmp_path / "a.onnx", nodes, {"w": filters, **({"b": bias} if biased else {})}, ["n", 3, "t"]
    )
    output = (0.02, 120)
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE}, outputs={"w": output})
    x = np.random.default_rng(3).normal(size=(2, 3, 9)).astype(np.float32)
    (got,), operators = ran(tmp_path / "b.onnx", tmp_path, x)
    del operators["Transpose"]  # the kernel wants channels last
    assert operators == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1}
    assert (detail["int8"], detail["float"]) == ({"conv": 1}, [])
    q = rounded(x, RANGE)
    exact = np.stack([np.einsum("nit,oit->no", q[:, :, i : i + 2], filters) for i in range(8)], axis=2)
    exact += bias[:, None] if biased else 0
    # with an activation behind it all 256 steps are for what is positive
    used = (output[0] * (255 - output[1]) / 255, 0) if relu else output
    exact = np.maximum(exact, 0) if relu else exact
    wanted = np.clip(exact, -used[1] * used[0], (255 - used[1]) * used[0])
    assert np.abs(got - wanted).max() <= used[0] * 0.51
    assert len(np.unique(np.round(got / used[0], 3))) > 20


def test_a_convolution_without_a_range_stays_float(tmp_path: Path) -> None:
    w = weight(4, 6)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    source = graph(tmp_path / "a.onnx", nodes, {"w": w.dense().reshape(4, 3, 2)}, ["n", 3, "t"])
    detail = qdq.quantise_graph(source, tmp_path / "b.onnx", {"w": w}, {"w": RANGE})
    assert detail["float"] == ["w"]
    x = np.ones((1, 3, 4), np.float32)
    assert np.array_equal(ran(tmp_path / "b.onnx", tmp_path, x)[0][0], ran(source, tmp_path, x)[0][0])


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    w = weight()
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = graph(tmp_path / "a.onnx", nodes, {"w": w.dense().T}, ["n", 8])
    for name in ("b", "c"):
        qdq.quantise_graph(source, tmp_path / f"{name}.onnx", {"w": w}, {"w": RANGE})
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
