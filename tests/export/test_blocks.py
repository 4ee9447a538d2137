"""Weights in blocks and in half precision inside the graph: the numbers of the checkpoint, in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kdcli.export import fusion, int8, sessions
from kdcli.export import onnx as exporter
from kdcli.export.half import halve_graph
from kdcli.export.int8 import Stored
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.models.integers import Integers
from kdcli.stages.quantize.rounding import rtn
from tests import tiny


def stored(matrix: Integers) -> Stored:
    zero = None if matrix.zero is None else matrix.zero.numpy()
    return Stored(matrix.values.numpy(), matrix.scale.numpy(), zero, matrix.bits)


def graph_of(dense: np.ndarray, kind: str, path: Path) -> None:
    """One product with, or one lookup in, a weight (O, I)."""
    rows, columns = dense.shape
    if kind == "MatMul":
        inputs, of, shape = ["x", "w"], np.ascontiguousarray(dense.T), ["n", rows]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
    else:
        inputs, of, shape = ["w", "x"], dense, ["n", columns]
        x = helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, ["y"])],
        "g",
        [x],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(of, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return sessions.open_session(path, threads=1, spinning=False).run(None, {"x": x})[0]


# 64 columns have blocks of 16 to 64; 40 have none, and a last block that is not full.
@pytest.mark.parametrize(("columns", "group"), [(64, 16), (64, 32), (64, None), (40, None)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_and_lookups_have_the_values_of_the_checkpoint(
    bits: int, symmetric: bool, columns: int, group: int | None, tmp_path: Path
) -> None:
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(bits))
    choose = rtn.symmetric if symmetric else rtn.asymmetric
    matrix = choose(weight, bits, group=group)
    dense = matrix.dense().numpy()
    assert np.array_equal(stored(matrix).dense(), dense)
    rng = np.random.default_rng(0)
    for kind, x in (
        ("MatMul", rng.normal(size=(3, columns)).astype(np.float32)),
        ("Gather", np.array([0, 11, 3, 3])),
    ):
        graph_of(dense, kind, tmp_path / "float.onnx")
        detail = int8.quantise_graph(
            tmp_path / "float.onnx", tmp_path / "small.onnx", {"w": stored(matrix)}, kernel="blocks"
        )
        assert detail["float"] == []
        assert sum(detail["stored"].values()) == sum(detail["executed"].values()) == dense.size
        want, got = run(tmp_path / "float.onnx", x), run(tmp_path / "small.onnx", x)
        assert want.shape == got.shape
        # Sums of 64 products in another order; a lookup sums nothing.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if kind == "MatMul" else 1e-6)
        tensors = onnx.load(str(tmp_path / "small.onnx")).graph.initializer
        largest = max(t.ByteSize() for t in tensors if not t.name.startswith("byte_of"))
        packed = {2: 2, 3: 4, 4: 4}.get(bits, 8)
        assert largest < dense.size * packed / 8 * 1.3 + 200


def test_ternary_and_binary_weights_are_held_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 2):
        values = torch.randint(-1, 2, (8, 32), generator=generator, dtype=torch.int8)
        values[values == 0] = 1 if bits == 1 else 0
        matrix = Integers(values, torch.rand(8, 1, generator=generator) + 0.5, bits=bits)
        graph_of(matrix.dense().numpy(), "MatMul", tmp_path / "float.onnx")
        int8.quantise_graph(
            tmp_path / "float.onnx", tmp_path / "small.onnx", {"w": stored(matrix)}, kernel="blocks"
        )
        x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
        np.testing.assert_allclose(
            run(tmp_path / "small.onnx", x), run(tmp_path / "float.onnx", x), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_uint8_weights_and_fixed_ranges_give_the_same_product(
    unsigned: bool, fixed: bool, tmp_path: Path
) -> None:
    matrix = rtn.symmetric(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), 8)
    graph_of(matrix.dense().numpy(), "MatMul", tmp_path / "float.onnx")
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 255
    ranges = {"w": (scale, round(-low / scale))} if fixed else None
    int8.quantise_graph(
        tmp_path / "float.onnx",
        tmp_path / "small.onnx",
        {"w": stored(matrix)},
        ranges=ranges,
        unsigned=unsigned,
    )
    got, want = run(tmp_path / "small.onnx", x), run(tmp_path / "float.onnx", x)
    # Half a step of the activations times the sum of a row's weights; the zero point may be off by half a step.
    assert (np.abs(got - want) <= scale * np.abs(matrix.dense().numpy()).sum(1) + 1e-5).all()
    assert not np.array_equal(got, want)
    weights = [numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "small.onnx")).graph.initializer]
    kinds = {w.dtype for w in weights if w.ndim == 2}
    assert kinds == {np.dtype(np.uint8 if unsigned else np.int8)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_whole_models_answer_as_before(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    integers = {}
    with torch.no_grad():
        for name, module in made.model.named_modules():
            if isinstance(module, nn.Linear) or name.endswith("_embeddings"):
                matrix = rtn.asymmetric(module.weight, 4, group=16)
                module.weight.copy_(matrix.dense())
                integers[f"{name}.weight"] = stored(matrix)
    batch = {k: v.numpy() for k, v in tiny.batch(family, 6).items()}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    names = list(model_inputs(made.model, batch, "cpu"))
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), tmp_path / "float.onnx")
    fusion.fuse(tmp_path / "float.onnx", tmp_path / "fused.onnx", embeddings=False, attention="separate")
    detail = int8.quantise_graph(tmp_path / "fused.onnx", tmp_path / "small.onnx", integers, kernel="blocks")
    assert detail["float"] == []
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "small.onnx")).graph.node]
    assert kinds.count("MatMulNBits") == sum("_embeddings" not in name for name in integers)
    assert kinds.count("GatherBlockQuantized") == sum("_embeddings" in name for name in integers)
    assert "Attention" not in kinds
    want, got = (
        sessions.runner(sessions.open_session(tmp_path / name, threads=1, spinning=False))(batch)
        for name in ("float.onnx", "small.onnx")
    )
    # Logits are of order 1 and differ by the order of sums alone.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_half_precision_stores_what_it_holds_exactly_and_nothing_else(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if parameter.ndim == 2 and "classifier" not in name:
                parameter.copy_(parameter.half().float())
    names = ["input_ids", "attention_mask", "token_type_ids"]
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), tmp_path / "float.onnx")
    fusion.fuse(tmp_path / "float.onnx", tmp_path / "fused.onnx", embeddings=False)
    detail = halve_graph(tmp_path / "fused.onnx", tmp_path / "half.onnx")
    graph = onnx.load(str(tmp_path / "half.onnx")).graph
    halves = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
    matrices = [p for n, p in made.model.named_parameters() if p.ndim == 2 and "classifier" not in n]
    assert sum(h.size for h in halves) == detail["stored"]["float16"] == sum(p.numel() for p in matrices)
    floats = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    assert [list(t.dims) for t in floats] in ([[2, 32]], [[32, 2]])
    batch = {k: v.numpy() for k, v in tiny.batch("bert", 6).items()}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    want, got = (
        sessions.runner(sessions.open_session(tmp_path / name, threads=1, spinning=False))(batch)
        for name in ("fused.onnx", "half.onnx")
    )
    assert np.array_equal(got, want)
