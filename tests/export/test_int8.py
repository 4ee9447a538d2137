"""Integer graphs: the checkpoint's own integers inside, the float graph's answers outside."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kdcli.export import fusion, int8, sessions
from kdcli.export import onnx as exporter
from kdcli.export.int8 import Stored
from kdcli.export.quiet import quiet
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.models import transforms
from kdcli.models.transforms import Cut
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.schemes.dynamic_int8 import Config, quantise
from tests import tiny

CASES = ["dense", "uneven", "emptied", "factorised"]
# Logits of these models are of order 1. Rounding activations to 8 bits moves one of them by up to 0.16 over
# all families and cases.
LOGIT_TOLERANCE = 0.25
AGREEMENT = 0.95


def surgery(made, case: str) -> None:
    """Leave behind everything that stages before quantize can."""
    if case == "uneven":
        transforms.apply(made.model, Cut(heads={0: [1, 3]}, neurons={0: list(range(20)), 1: [0]}))
    elif case == "emptied":
        transforms.apply(made.model, Cut(heads={0: []}, neurons={1: []}))
    elif case == "factorised":
        layer, family = f"{made.family.layers}.1", made.family
        for part in (family.value, family.ffn_in, family.attention_output):
            pair = transforms.factorise(made.model, f"{layer}.{part}", 9)
            for factor in (pair.first, pair.second):
                nn.init.normal_(factor.weight, std=0.3)


def quantised(made, config: Config | None = None, *, tables: bool = True, keep: str = "none"):
    """Round the weights of ``made`` in place; name -> (integers, scales)."""
    config = config or Config()
    integers = {}
    for name, module in made.model.named_modules():
        table = name.endswith("_embeddings")
        if keep not in name and (isinstance(module, nn.Linear) or (table and tables)):
            matrix = rtn.table(module.weight, "int8") if table else quantise(module.weight, config)
            with torch.no_grad():
                module.weight.copy_(matrix.dense())
            integers[f"{name}.weight"] = Stored(matrix.values.numpy(), matrix.scale.numpy())
    return integers


def arrays(family: str, rows: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    made = {k: v.numpy() for k, v in tiny.batch(family, rows, seed).items()}
    return {**made, "token_type_ids": np.zeros_like(made["input_ids"])}


def export(made, path: Path, route=None) -> None:
    names = list(model_inputs(made.model, arrays(made.model_type, 2), "cpu"))
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), path, route=route)


def answers(path: Path, family: str, rows: int = 40) -> np.ndarray:
    """Every row alone, so that no row's activations set another's scale."""
    run = sessions.runner(sessions.open_session(path, threads=1, spinning=False))
    batch = arrays(family, rows)
    lengths = batch["attention_mask"].sum(1)
    return np.concatenate(
        [run({k: v[i : i + 1, :n] for k, v in batch.items()}) for i, n in enumerate(lengths)]
    )


def initialisers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def contains(stored: dict[str, np.ndarray], values: np.ndarray, scale: np.ndarray) -> bool:
    """Whether some operator holds these integers and scales: as a table, a matrix, or a part of attention."""
    for name, matrix in stored.items():
        if matrix.dtype != np.int8 or matrix.ndim != 2:
            continue
        scales = stored[f"{name}_scale"]
        if np.array_equal(matrix, values) and np.array_equal(scales, scale):
            return True
        width = len(values)
        for start in range(0, matrix.shape[1] - width + 1, width):
            part = slice(start, start + width)
            if np.array_equal(matrix[:, part], values.T) and np.array_equal(scales[part], scale[:, 0]):
                return True
    return False


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_graph_holds_the_checkpoints_integers_and_answers_as_the_float_graph(
    family: str, case: str, fused: bool, tmp_path: Path
) -> None:
    made = tiny.checkpoint(family)
    surgery(made, case)
    integers = quantised(made)
    export(made, source := tmp_path / "float.onnx")
    if fused:
        fusion.fuse(source, source := tmp_path / "fused.onnx", embeddings=False)
    detail = int8.quantise_graph(source, target := tmp_path / "int8.onnx", integers)
    assert detail["float"] == []
    assert detail["largest"] == 64
    assert detail["int8"]["gather"] == sum("_embeddings" in name for name in integers)
    attentions = [node for node in onnx.load(str(source)).graph.node if node.op_type == "Attention"]
    assert detail["int8"].get("attention", 0) == len(attentions)
    assert bool(attentions) == (fused and family != "mpnet")

    stored = initialisers(target)
    assert all(contains(stored, m.values, m.scale) for m in integers.values())
    # Saturation cannot be seen on a processor with VNNI, so the bound is checked on what the file holds.
    multiplied = {
        name
        for node in onnx.load(str(target)).graph.node
        if node.op_type in ("MatMulInteger", "QAttention")
        for name in node.input
        if name in stored and stored[name].dtype == np.int8
    }
    assert max(int(np.abs(stored[name].astype(int)).max()) for name in multiplied) == 64
    assert 2 * 255 * 64 <= 32767
    # No float matrix is left but what was never quantised.
    floats = [a.shape for a in stored.values() if a.dtype == np.float32 and a.ndim == 2 and a.shape[1] > 1]
    assert floats == ([(32, 4)] if family == "mpnet" else [])

    want, got = answers(source, family), answers(target, family)
    assert np.abs(want - got).max() < LOGIT_TOLERANCE
    assert (want.argmax(1) == got.argmax(1)).mean() >= AGREEMENT
    assert not np.array_equal(want, got)  # activations are rounded: it really is an integer graph


@pytest.mark.parametrize("reduce_range", [True, False])
def test_matrices_and_answers_are_those_of_onnxruntimes_quantiser(reduce_range: bool, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = tiny.checkpoint("bert")
    export(made, tmp_path / "original.onnx")
    integers = quantised(made, Config(reduce_range=reduce_range), tables=False)
    export(made, tmp_path / "float.onnx")
    for name in ("original", "float"):
        fusion.fuse(tmp_path / f"{name}.onnx", tmp_path / f"{name}-fused.onnx", embeddings=False)
    detail = int8.quantise_graph(tmp_path / "float-fused.onnx", tmp_path / "ours.onnx", integers)
    assert detail["int8"] == {"attention": 2, "gemm": 2, "matmul": 6}
    with quiet():
        quantize_dynamic(
            tmp_path / "original-fused.onnx",
            tmp_path / "theirs.onnx",
            op_types_to_quantize=["MatMul", "Attention"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    ours, theirs = initialisers(tmp_path / "ours.onnx"), initialisers(tmp_path / "theirs.onnx")
    # Theirs turns a Gemm into a MatMul first and adds that to the weight's name.
    theirs = {name.replace("_Transposed", ""): matrix for name, matrix in theirs.items()}
    found = {name.removesuffix("_int8") for name in ours if name.endswith("_int8")}
    assert found == {name.removesuffix("_quantized") for name in theirs if name.endswith("_quantized")}
    assert len(found) == 10
    for name in found:
        assert np.array_equal(ours[f"{name}_int8"], theirs[f"{name}_quantized"])
        assert np.array_equal(ours[f"{name}_int8_scale"], theirs[f"{name}_scale"])
    np.testing.assert_allclose(
        answers(tmp_path / "ours.onnx", "bert"), answers(tmp_path / "theirs.onnx", "bert"), rtol=0, atol=1e-5
    )


def test_names_dimensions_and_metadata_stay_and_nothing_else_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tiny.checkpoint("bert")
    integers = quantised(made)
    export(made, source := tmp_path / "float.onnx")
    exporter.annotate(source, ["no", "yes"], {"stage": "quantize"})
    before = source.read_bytes()
    int8.quantise_graph(source, target := tmp_path / "int8.onnx", integers)
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]
    assert source.read_bytes() == before
    old, new = onnx.load(str(source)), onnx.load(str(target))
    onnx.checker.check_model(new, full_check=True)
    assert list(old.graph.input) == list(new.graph.input)
    assert list(old.graph.output) == list(new.graph.output)
    assert list(old.metadata_props) == list(new.metadata_props)
    assert list(old.opset_import) == list(new.opset_import)
    exporter.check_dimensions(target, [i.name for i in new.graph.input])
    # The same input gives the same bytes.
    int8.quantise_graph(source, again := tmp_path / "again.onnx", integers)
    assert again.read_bytes() == target.read_bytes()


def test_what_the_checkpoint_keeps_in_float_stays_float(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    integers = quantised(made, keep="layer.0.attention.self.query")
    export(made, tmp_path / "float.onnx")
    detail = int8.quantise_graph(tmp_path / "float.onnx", tmp_path / "plain.onnx", integers)
    assert detail["float"] == []
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "plain.onnx")).graph.node]
    assert kinds.count("MatMulInteger") == len([n for n in integers if "_embeddings" not in n]) == 13
    # A fused attention is one operator: its key and value stay float with the query, and that is said.
    fusion.fuse(tmp_path / "float.onnx", tmp_path / "fused.onnx", embeddings=False)
    detail = int8.quantise_graph(tmp_path / "fused.onnx", tmp_path / "int8.onnx", integers)
    assert detail["float"] == [
        f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("key", "value")
    ]
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "int8.onnx")).graph.node]
    assert (kinds.count("Attention"), kinds.count("QAttention")) == (1, 1)
    want = answers(tmp_path / "float.onnx", "bert")
    assert np.abs(want - answers(tmp_path / "int8.onnx", "bert")).max() < LOGIT_TOLERANCE


def test_tables_inside_a_fused_embedding_layer_stay_float_and_are_named(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    integers = quantised(made)
    export(made, tmp_path / "float.onnx")
    counts = fusion.fuse(tmp_path / "float.onnx", tmp_path / "fused.onnx", embeddings=True)
    assert counts["EmbedLayerNormalization"] == 1
    detail = int8.quantise_graph(tmp_path / "fused.onnx", tmp_path / "int8.onnx", integers)
    assert detail["float"] == sorted(name for name in integers if "_embeddings" in name)
    want = answers(tmp_path / "float.onnx", "bert")
    assert np.abs(want - answers(tmp_path / "int8.onnx", "bert")).max() < LOGIT_TOLERANCE


@pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="the dynamo route needs onnxscript"
)
def test_the_graph_of_the_other_exporter_is_quantised_too(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert", layers=1)
    integers = quantised(made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(made, tmp_path / "float.onnx", route="dynamo")
    detail = int8.quantise_graph(tmp_path / "float.onnx", tmp_path / "int8.onnx", integers)
    assert detail["float"] == []
    want = answers(tmp_path / "float.onnx", "bert")
    assert np.abs(want - answers(tmp_path / "int8.onnx", "bert")).max() < LOGIT_TOLERANCE


def gemm(tmp_path: Path, **attributes: float) -> tuple[Path, dict, np.ndarray]:
    """A graph of one Gemm with bias, and the integers of its weight."""
    generator = torch.Generator().manual_seed(0)
    matrix = quantise(torch.randn(5, 8, generator=generator), Config())
    dense = matrix.dense().numpy()
    bias = np.arange(5, dtype=np.float32)
    if not attributes.get("transB"):
        dense = np.ascontiguousarray(dense.T)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(dense, "w"), numpy_helper.from_array(bias, "b")],
    )
    path = tmp_path / "gemm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path, {"w": Stored(matrix.values.numpy(), matrix.scale.numpy())}, bias


@pytest.mark.parametrize(
    ("attributes", "becomes_integer"),
    [
        ({"transB": 1}, True),
        ({}, True),
        ({"transB": 1, "alpha": 0.5}, False),
        ({"transB": 1, "beta": 0.0}, False),
    ],
)
def test_only_a_plain_gemm_is_replaced(attributes: dict, becomes_integer: bool, tmp_path: Path) -> None:
    path, integers, _ = gemm(tmp_path, **attributes)
    detail = int8.quantise_graph(path, target := tmp_path / "int8.onnx", integers)
    assert detail["int8"] == ({"gemm": 1} if becomes_integer else {})
    assert detail["float"] == ([] if becomes_integer else ["w"])
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    want, got = (sessions.open_session(p, threads=1).run(None, {"x": x})[0] for p in (path, target))
    # Half a step of the activations times the sum of a row's weights, at the most.
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    dense = integers["w"].dense()
    assert (np.abs(want - got) <= step * np.abs(dense).sum(1) + 1e-5).all()
    assert np.array_equal(want, got) != becomes_integer


def test_weights_that_the_graph_does_not_hold_are_named(tmp_path: Path) -> None:
    path, integers, _ = gemm(tmp_path, transB=1)
    other = integers["w"]._replace(scale=integers["w"].scale * 2)
    detail = int8.quantise_graph(path, tmp_path / "int8.onnx", {"other": other, **integers})
    assert detail["float"] == ["other"]


@pytest.mark.parametrize("extra", ["bias", "sizes"])
def test_attention_that_has_no_integer_form_stays_float(extra: str, tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    integers = quantised(made)
    export(made, tmp_path / "float.onnx")
    fusion.fuse(tmp_path / "float.onnx", tmp_path / "fused.onnx", embeddings=False)
    model = onnx.load(str(tmp_path / "fused.onnx"))
    first = next(node for node in model.graph.node if node.op_type == "Attention")
    if extra == "bias":  # an attention bias (1, 1, 1, 1) of zero, behind the absent past
        first.input.extend(["", "attention_bias"])
        zero = numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "attention_bias")
        model.graph.initializer.append(zero)
    else:
        first.attribute.append(helper.make_attribute("qkv_hidden_sizes", [32, 32, 32]))
    onnx.save(model, str(tmp_path / "fused.onnx"))
    detail = int8.quantise_graph(tmp_path / "fused.onnx", tmp_path / "int8.onnx", integers)
    assert detail["int8"]["attention"] == 1
    assert {name.split(".")[-2] for name in detail["float"]} == {"query", "key", "value"}
    kept = next(n for n in onnx.load(str(tmp_path / "int8.onnx")).graph.node if n.op_type == "Attention")
    assert kept == first
