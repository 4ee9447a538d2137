"""Bytes on disk."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from kdcli.measure import size


def test_only_the_weights_count_as_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"a" * 1000)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"b" * 234)
    (tmp_path / "config.json").write_bytes(b"{}")
    graph = tmp_path / "elsewhere" / "model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(b"c" * 77)
    found = size.measure(tmp_path, 10, 7, graph)
    assert found.checkpoint_bytes == 1234
    assert found.onnx_bytes == 77
    assert found.onnx_gzip_bytes == len(gzip.compress(b"c" * 77, 1))
    assert (found.parameters, found.nonzero_parameters) == (10, 7)


@pytest.mark.parametrize("length", [0, 5, size._CHUNK, 2 * size._CHUNK + 3])
def test_gzip_in_pieces_is_gzip_at_once(tmp_path: Path, length: int) -> None:
    values = np.random.default_rng(0).integers(0, 12, length, dtype=np.uint8).tobytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(values)
    assert size.gzip_bytes(path) == len(gzip.compress(values, 1))


def test_zeroed_weights_are_worth_something_in_an_archive(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dense.write_bytes(weights.tobytes())
    sparse.write_bytes(np.where(np.arange(50_000) % 10, 0, weights).astype(np.float32).tobytes())
    assert size.gzip_bytes(sparse) < 0.3 * size.gzip_bytes(dense)
