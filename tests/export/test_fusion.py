"""Fusing a graph whose weights wait in a file gives the graph that fusing in memory gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdcli.export import attention, fusion, sessions
from kdcli.export import onnx as exporter
from kdcli.families.stack import encoder_linears
from kdcli.inputs.text import TEXT
from kdcli.models import transforms
from tests import tiny


@pytest.mark.parametrize("kind", ["packed", "separate"])
def test_large_graphs_fuse_as_small_ones_do(
    kind: fusion.Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint("bert")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), tmp_path / "plain.onnx")
    here = Path.cwd()
    counts = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "small.onnx", attention=kind)
    monkeypatch.setattr(fusion, "_LARGE", 1)
    again = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "large.onnx", attention=kind)
    assert counts == again
    assert counts["Attention" if kind == "packed" else "MultiHeadAttention"] == 2
    # One file, nothing beside it, and the same place to work in as before.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "plain.onnx", "small.onnx"]
    assert Path.cwd() == here
    small, large = (onnx.load(str(tmp_path / f"{name}.onnx")).graph for name in ("small", "large"))
    assert [node.op_type for node in small.node] == [node.op_type for node in large.node]
    for a, b in zip(small.initializer, large.initializer, strict=True):
        assert a.name == b.name
        assert np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


def test_models_with_equal_weights_fuse(tmp_path: Path) -> None:
    made = tiny.untrained("bert")  # every bias is zero, every layer norm is one
    names = ["input_ids", "attention_mask"]
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), tmp_path / "plain.onnx")
    counts = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx")
    assert counts == {
        "EmbedLayerNormalization": 1,
        "Attention": 2,
        "BiasGelu": 2,
        "SkipLayerNormalization": 4,
    }


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_attention_between_factors_is_one_operator_too(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    query = next(n for n in encoder_linears(made.model, made.family) if n.endswith(made.family.query))
    transforms.factorise_linears(made.model, [query], 4)  # the other layer stays whole
    names = ["input_ids", "attention_mask"]
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), plain)
    counts = fusion.fuse(plain, fused)
    assert counts["MultiHeadAttention"] == counts["Attention"] == 1
    kinds = {node.op_type for node in onnx.load(str(fused)).graph.node}
    assert "Softmax" not in kinds  # nothing of what it stands for is left
    batch = {name: values.numpy() for name, values in tiny.batch(family).items() if name in names}
    assert (batch["attention_mask"] == 0).any()
    want, got = (sessions.runner(sessions.open_session(p, threads=1))(batch) for p in (plain, fused))
    # The same sums in another order, in float32.
    assert np.abs(want - got).max() < 1e-5


def test_other_attention_is_left_alone(tmp_path: Path) -> None:
    made = tiny.checkpoint("mpnet")  # adds a bias by position to its scores
    names = ["input_ids", "attention_mask"]
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), tmp_path / "a.onnx")
    graph = onnx.load(str(tmp_path / "a.onnx")).graph
    before = graph.SerializeToString()
    assert attention.fuse(graph) == 0
    assert graph.SerializeToString() == before
