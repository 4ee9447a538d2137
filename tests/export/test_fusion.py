"""Fusing a graph whose weights wait in a file gives the graph that fusing in memory gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdcli.export import fusion
from kdcli.export import onnx as exporter
from tests import tiny


@pytest.mark.parametrize("attention", ["packed", "separate"])
def test_large_graphs_fuse_as_small_ones_do(
    attention: fusion.Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint("bert")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    exporter.export(
        made.model, exporter.example(made.config.vocab_size, names, "cpu"), tmp_path / "plain.onnx"
    )
    here = Path.cwd()
    counts = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "small.onnx", attention=attention)
    monkeypatch.setattr(fusion, "_LARGE", 1)
    again = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "large.onnx", attention=attention)
    assert counts == again
    assert counts["Attention" if attention == "packed" else "MultiHeadAttention"] == 2
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
    exporter.export(
        made.model, exporter.example(made.config.vocab_size, names, "cpu"), tmp_path / "plain.onnx"
    )
    counts = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx")
    assert counts == {
        "EmbedLayerNormalization": 1,
        "Attention": 2,
        "BiasGelu": 2,
        "SkipLayerNormalization": 4,
    }
