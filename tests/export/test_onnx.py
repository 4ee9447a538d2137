"""Both export routes, the fusions, and what parity refuses."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kdcli.errors import ParityError
from kdcli.export import fusion, parity, sessions
from kdcli.export import onnx as exporter
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.models import transforms
from kdcli.models.transforms import Cut
from tests import tiny

CUTS = {
    "dense": None,
    "uneven": Cut(heads={0: [1, 3]}, neurons={0: list(range(20)), 1: [0]}),
    "emptied": Cut(heads={0: []}, neurons={1: []}),
}


def arrays(family: str, rows: int, seed: int, extra: int = 0) -> dict[str, np.ndarray]:
    """A batch as the data package makes them, padded ``extra`` columns further than needed."""
    made = {k: v.numpy() for k, v in tiny.batch(family, rows, seed).items()}
    pad = int(tiny.tokenizer(family).pad_token_id)
    made["input_ids"] = np.pad(made["input_ids"], ((0, 0), (0, extra)), constant_values=pad)
    made["attention_mask"] = np.pad(made["attention_mask"], ((0, 0), (0, extra)))
    made["token_type_ids"] = np.zeros_like(made["input_ids"])
    return made


def both(made, path: Path, route=None):
    names = list(model_inputs(made.model, arrays(made.model_type, 2, 0), "cpu"))
    exporter.export(made.model, TEXT.example(made.config.vocab_size, names, "cpu"), path, route=route)

    @torch.no_grad()
    def reference(batch):
        return made.model(**model_inputs(made.model, batch, "cpu")).logits.numpy()

    def candidate(file: Path):
        return sessions.runner(sessions.open_session(file, threads=1, spinning=False))

    return reference, candidate


BATCHES = [(1, 1, 0), (1, 2, 0), (4, 3, 0), (3, 4, 6)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("case", CUTS)
def test_graph_and_fused_graph_agree_with_torch(family: str, case: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    if CUTS[case] is not None:
        transforms.apply(made.model, CUTS[case])
    reference, candidate = both(made, tmp_path / "plain.onnx")
    batches = [arrays(family, *b) for b in BATCHES]
    result = parity.compare(reference, candidate(tmp_path / "plain.onnx"), batches)
    assert result.passed, result
    assert result.shapes[0][0] == 1
    counts = fusion.fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx")
    result = parity.compare(reference, candidate(tmp_path / "fused.onnx"), batches)
    assert result.passed, (counts, result)
    if family in ("bert", "electra") and case != "emptied":
        assert counts["Attention"] == 2, counts
        found = [n for n in onnx.load(str(tmp_path / "fused.onnx")).graph.node if n.op_type == "Attention"]
        heads = [next(a.i for a in n.attribute if a.name == "num_heads") for n in found]
        assert heads == ([2, 4] if case == "uneven" else [4, 4])


@pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="the dynamo route needs onnxscript"
)
def test_the_route_that_will_replace_the_legacy_one_works(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference, candidate = both(made, tmp_path / "plain.onnx", route="dynamo")
    result = parity.compare(
        reference, candidate(tmp_path / "plain.onnx"), [arrays("bert", *b) for b in BATCHES]
    )
    assert result.passed, result


@pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="the dynamo route needs onnxscript"
)
def test_the_other_route_is_taken_when_torch_drops_the_legacy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.onnx.export

    def without(*args, dynamo: bool, **kwargs):
        if not dynamo:
            raise TypeError("export() got an unexpected keyword argument")
        return real(*args, dynamo=True, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", without)
    made = tiny.checkpoint("bert")
    names = list(model_inputs(made.model, arrays("bert", 2, 0), "cpu"))
    inputs = TEXT.example(made.config.vocab_size, names, "cpu")
    assert exporter.export(made.model, inputs, tmp_path / "plain.onnx") == "dynamo"


def test_a_wrong_graph_never_passes(tmp_path: Path) -> None:
    made, other = tiny.checkpoint("bert"), tiny.checkpoint("bert", seed=1)
    reference, candidate = both(made, tmp_path / "a.onnx")
    both(other, tmp_path / "b.onnx")
    batches = [arrays("bert", *b) for b in BATCHES]
    assert parity.compare(reference, candidate(tmp_path / "a.onnx"), batches).passed
    assert not parity.compare(reference, candidate(tmp_path / "b.onnx"), batches).passed

    def broken(batch):
        return np.full((len(batch["input_ids"]), 2), np.nan, dtype=np.float32)

    for exact in (True, False):
        assert not parity.compare(reference, broken, batches, exact=exact).passed
        assert not parity.compare(broken, broken, batches, exact=exact).passed


def test_constant_dimensions_are_refused(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    both(made, tmp_path / "a.onnx")
    model = onnx.load(str(tmp_path / "a.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(model, str(tmp_path / "fixed.onnx"))
    with pytest.raises(ParityError, match="batch, sequence"):
        exporter.check_dimensions(tmp_path / "fixed.onnx", [i.name for i in model.graph.input])


def test_export_is_silent_and_keeps_the_mode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = tiny.checkpoint("bert")
    made.model.train()
    both(made, tmp_path / "a.onnx")
    fusion.fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert made.model.training
    assert capfd.readouterr() == ("", "")


def test_metadata_carries_the_labels(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    both(made, tmp_path / "a.onnx")
    exporter.annotate(tmp_path / "a.onnx", ["no", "yes"], {"stage": "distill"})
    session = sessions.open_session(tmp_path / "a.onnx", threads=1)
    assert session.get_modelmeta().custom_metadata_map == {"labels": '["no", "yes"]', "stage": "distill"}
