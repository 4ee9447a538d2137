"""Graphs that are written piece by piece are the graphs that the library writes whole."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdcli.errors import InputError
from kdcli.export import files, sessions
from kdcli.export import onnx as exporter
from kdcli.inputs.text import TEXT
from tests import tiny

NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def exported(path: Path, family: str = "bert") -> Path:
    made = tiny.untrained(family)  # with equal weights among its own
    names = NAMES[: 2 if family in ("distilbert", "roberta", "mpnet") else 3]
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), path)
    return path


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    model = onnx.load(str(exported(tmp_path / "a.onnx")))
    exporter.set_metadata(model, tiny.LABELS, {"stage": "ünïcode"})
    model.graph.doc_string, model.domain = "words", "some.where"
    model.graph.metadata_props.add(key="k", value="v")
    model.graph.initializer[0].doc_string = "of a weight"
    onnx.save(model, str(tmp_path / "whole.onnx"))
    files.save(model, tmp_path / "pieces.onnx")
    assert (tmp_path / "pieces.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 2**14, 2**21 + 5])
def test_sizes_of_all_lengths(size: int, tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.arange(n, dtype=np.uint8), f"w{n}") for n in (size, 3)]
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    files.save(model, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == model.SerializeToString()
    contents = {t.name: numpy_helper.to_array(t) for t in tensors}
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
    files.save(model, tmp_path / "b.onnx", weights=contents)
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


def test_what_no_file_can_hold_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(str(exported(tmp_path / "a.onnx")))
    monkeypatch.setattr(files, "_MOST", 1000)
    with pytest.raises(InputError, match=r"GiB.*less than 2 GiB"):
        files.save(model, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_large_models_are_exported_as_small_ones_are(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported(tmp_path / "whole.onnx", family)
    used: list[int] = []
    save = files.save

    def counting(model, target, *, weights=None):
        used.append(len(weights or {}))
        save(model, target, weights=weights)

    monkeypatch.setattr(files, "save", counting)
    monkeypatch.setattr(exporter, "_LARGE", 1)
    apart = exported(tmp_path / "apart.onnx", family)
    assert len(used) == 1
    assert used[0] > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["apart.onnx", "whole.onnx"]
    assert onnx.load(str(apart)) == onnx.load(str(whole))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_view_is_the_graph_whose_weights_stay_in_the_file(family: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "a.onnx", family)
    whole = files.load(path)
    model, weights = files.view(path)
    large = {t.name for t in whole.graph.initializer if len(t.raw_data) >= 1024}
    assert set(weights) == large
    assert len(large) > 10
    assert (
        model.ByteSize() < 0.5 * whole.ByteSize()
    )  # these are small: biases and nodes are most of what is left
    for tensor, want in zip(model.graph.initializer, whole.graph.initializer, strict=True):
        found = files.values(tensor, weights)
        np.testing.assert_array_equal(found, numpy_helper.to_array(want), strict=True)
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0
    files.save(model, tmp_path / "b.onnx", weights=weights)
    assert (tmp_path / "b.onnx").read_bytes() == whole.SerializeToString(deterministic=True)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_view_needs_no_memory_for_weights(tmp_path: Path) -> None:
    def anonymous() -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))

    size = 64 << 20
    given = numpy_helper.from_array(np.ones(size, np.uint8), "w")
    files.save(helper.make_model(helper.make_graph([], "g", [], [], [given])), tmp_path / "a.onnx")
    del given
    before = anonymous()
    model, weights = files.view(tmp_path / "a.onnx")
    assert int(files.values(model.graph.initializer[0], weights).sum()) == size  # every page was read
    files.save(model, tmp_path / "b.onnx", weights=weights)
    assert anonymous() - before < size / 8
    whole = files.load(tmp_path / "a.onnx")
    assert anonymous() - before > size / 2
    assert len(whole.graph.initializer[0].raw_data) == size


def test_a_view_holds_what_has_no_raw_bytes(tmp_path: Path) -> None:
    given = np.arange(600, dtype=np.float32).reshape(20, 30)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, given.shape, given.ravel())  # in float_data
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), str(tmp_path / "a.onnx"))
    model, weights = files.view(tmp_path / "a.onnx")
    assert weights == {}
    np.testing.assert_array_equal(files.values(model.graph.initializer[0], weights), given)


def test_an_outline_is_the_graph_without_its_weights(tmp_path: Path) -> None:
    path = exported(tmp_path / "a.onnx")
    model = onnx.load(str(path))
    del model.graph.initializer[:]
    assert files.outline(path) == model


@pytest.mark.parametrize("content", [b"x", b"no graph at all", b"\x3a\xff\xff\x01short"])
def test_what_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX graph"):
        files.outline(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not an ONNX graph"):
        files.outline(path)


def test_a_graph_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "a.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        files.outline(path)


def test_a_graph_that_refers_to_a_file_gives_its_answers_from_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path / "a.onnx")
    small = onnx.load_from_string(files.referring(path))
    aside = [t for t in small.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert {t.external_data[0].value for t in aside} == {"a.onnx"}
    assert len(files.referring(path)) < path.stat().st_size / 2
    rows = {name: np.ones((3, 7), dtype=np.int64) for name in NAMES}
    want = sessions.runner(sessions.open_session(path, threads=1))(rows)
    monkeypatch.setattr(files, "LARGE", 1)
    with sessions.running(path, threads=1) as run:
        assert np.array_equal(run(rows), want)  # the same kernels on the same numbers
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut off"):
        sessions.open_session(path, threads=1)
    with pytest.raises(InputError, match="cannot open"):
        sessions.open_session(tmp_path / "none.onnx", threads=1)
