"""Low rank through the whole life of a stage: the graph that ships, what follows it, convolutions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from kdcli.errors import UsageError
from kdcli.families.modules import LowRankEmbedding
from kdcli.models import checkpoint as checkpoints
from kdcli.models.conv_factors import FactorisedConv
from kdcli.models.transforms import FactoriseConv
from kdcli.probe import layer_clock, speedup
from kdcli.probe.speedup import Speed
from kdcli.progress import Progress
from kdcli.request import Common, Gates, Request
from kdcli.run import life
from kdcli.stages.lowrank import matrices
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny
from tests.stages import contexts
from tests.stages.lowrank.test_stage import context_of

pytestmark = pytest.mark.usefixtures("shared_exports")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lowrank")
    tiny.saved(base / "model", hidden=32, neurons=64)
    tiny.write_data(base / "data")
    return base


def run(stage, model: Path, out: Path, data: Path, options, **more):
    request = Request(
        stage=stage, model=str(model), options=options, common=Common(out=out, data=str(data), **more)
    )
    outcome = life.run(request, Progress())
    assert outcome is not None
    return outcome.report


def accuracy(directory: Path, data: Path) -> float:
    """By onnxruntime and the tokenizer alone, one row at a time."""
    names = json.loads((directory / "config.json").read_text())["id2label"]
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    with (data / "test.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    right = 0
    for row in rows:
        e = tok.encode(row["text"])
        feed = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        given = {i.name: np.array([feed[i.name]], dtype=np.int64) for i in session.get_inputs()}
        right += names[str(int(session.run(None, given)[0].argmax()))] == row["label"]
    return right / len(rows)


def test_table_and_shared_factors_ship_and_are_quantised(place: Path) -> None:
    options = LowRankOptions(rank=12, method="whitening", include=("embeddings",))
    out, data = place / "out", place / "data"
    report = run("lowrank", place / "model", out, data, options, settings={"share_right": "true"})
    assert report.parity.passed
    assert accuracy(out, data) == report.after.quality.accuracy.value
    # What the report counts is what the file holds: the shared factor once.
    weights = checkpoints.load(out)
    assert isinstance(weights.model.bert.embeddings.word_embeddings, LowRankEmbedding)
    sizes = [onnx.numpy_helper.to_array(t).size for t in onnx.load(out / "model.onnx").graph.initializer]
    assert report.after.size.parameters == sum(p.numel() for p in weights.model.parameters())
    assert sum(sizes) < 1.1 * report.after.size.parameters
    assert report.after.size.parameters < report.before.size.parameters
    row = report.method.layers[0]
    assert row["name"] == "bert.embeddings.word_embeddings"
    small = run("quantize", out, place / "int8", data, QuantizeOptions())
    assert small.parity.passed
    quantised = json.loads((place / "int8" / "kdcli.json").read_text())["transforms"][-1]["tensors"]
    assert "bert.embeddings.word_embeddings.token_embeddings.weight" in quantised
    again = checkpoints.load(place / "int8")
    attention = again.model.bert.encoder.layer[0].attention.self
    assert attention.query.first is attention.value.first


def test_a_second_run_gives_the_same_bytes_and_merging_all_gives_a_plain_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = place / "data"
    for name in ("one", "two"):
        run("lowrank", place / "model", place / name, data, LowRankOptions(budget=0.7))
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    from kdcli.stages.lowrank import merging

    monkeypatch.setattr(
        merging.Clock, "product", lambda self, outputs, inputs, rank: 1.0 if rank is None else 2.0
    )
    report = run("lowrank", place / "one", place / "merged", data, LowRankOptions(merge=True))
    assert report.method.name == "merge"
    assert report.after.size.parameters == report.before.size.parameters + sum(
        row["parameters_after"] - row["parameters_before"] for row in report.method.layers
    )
    assert report.delta.agreement == 1
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(place / "merged", attn_implementation="eager")
    ours = checkpoints.load(place / "one").model
    batch = tiny.batch()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, ours(**batch).logits, rtol=0, atol=1e-5)


def test_a_gate_and_a_search_are_one_option(place: Path) -> None:
    report = run(
        "lowrank",
        place / "model",
        place / "gated",
        place / "data",
        LowRankOptions(),
        gates=Gates(max_drop=1.0),
    )
    # Any accuracy will do, so the smallest budget that was tried.
    steps = report.method.detail["search"]["steps"]
    assert all(step["kept"] for step in steps if step["accuracy"] is not None)
    assert [gate.passed for gate in report.gates] == [True]
    assert report.method.detail["parameters_kept"] < 0.3


def cnn(seed: int = 0):
    """A student of three convolutions over tokens, with a low-rank part to find."""
    from kdcli.models.small import CnnConfig

    torch.manual_seed(seed)
    names = dict(enumerate(tiny.LABELS))
    tok = tiny.tokenizer()
    config = CnnConfig(
        vocab_size=len(tok),
        hidden_size=24,
        intermediate_size=20,
        pad_token_id=tok.pad_token_id,
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    model = checkpoints.fresh(config).eval()
    return checkpoints.Checkpoint(
        model, tok, list(tiny.LABELS), checkpoints.TransformLog(), Path("/nonexistent")
    )


def logits(made) -> torch.Tensor:
    with torch.no_grad():
        return made.model(**tiny.batch(rows=20)).logits


@pytest.mark.parametrize("method", ["tucker2", "cp", "tensor-train"])
def test_convolutions_by_budget(method: str, tmp_path: Path) -> None:
    made = cnn()
    applied = contexts.applied(lowrank, context_of(made, tmp_path, method=method, budget=0.6))
    detail = applied.method.detail
    assert detail["parameters_kept"] <= 0.6
    assert detail["allocation"]["chosen"] in ("even", "weighted")
    for row in applied.method.layers:
        layer = made.model.get_submodule(row["name"])
        assert sum(p.numel() for p in layer.parameters()) == row["parameters_after"]
        assert isinstance(layer, FactorisedConv) != row["kept_dense"]
        assert (row["error_measured"] > 0) == (not row["kept_dense"])
        assert row["latency_after_ms"] > 0
    (transform,) = made.log.transforms
    assert isinstance(transform, FactoriseConv)
    assert transform.kind == method
    now = logits(made)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again), now, rtol=0, atol=1e-5)
    # Merged it is one convolution again, with the same answers.
    merged = contexts.applied(lowrank, context_of(made, tmp_path, method=method, merge=True))
    assert {row["merged"] for row in merged.method.layers} <= {True, False}
    torch.testing.assert_close(logits(made), now, rtol=0, atol=1e-5)


def test_convolutions_by_rank_by_energy_and_not_at_all(tmp_path: Path) -> None:
    made = cnn()
    dense = logits(made)
    applied = contexts.applied(lowrank, context_of(made, tmp_path, method="tucker2", rank=8))
    assert all(max(row["rank"]) <= 8 for row in applied.method.layers)
    made = cnn()
    whole = contexts.applied(lowrank, context_of(made, tmp_path, method="tucker2", energy=1.0))
    assert [w.code for w in whole.warnings] == ["nothing-factorised"]
    assert torch.equal(logits(made), dense)
    errors = []
    for energy in (0.5, 0.8):
        made = cnn()
        applied = contexts.applied(lowrank, context_of(made, tmp_path, method="tensor-train", energy=energy))
        errors.append(sum(row["error_predicted"] for row in applied.method.layers))
    assert errors[0] > errors[1] > 0


def test_convolutions_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--budget 0.001 cannot be met: the lowest ranks keep about"):
        lowrank.prepare(context_of(cnn(), tmp_path, method="tucker2", budget=0.001))
    with pytest.raises(UsageError, match="--include 'nothing' matches no dense convolution"):
        lowrank.prepare(context_of(cnn(), tmp_path, method="tucker2", include=("nothing",)))


def test_a_target_speedup_is_that_of_the_graph_that_ships(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that takes a nanosecond for every weight of a graph, by a clock that sees only half of it."""

    def weights(path: Path) -> float:
        return sum(onnx.numpy_helper.to_array(t).size for t in onnx.load(path).graph.initializer) / 1e6

    def product(self, outputs: int, inputs: int, rank: int | None) -> float:
        return (outputs * inputs if rank is None else rank * (outputs + inputs)) / 2e6

    def in_turns(paths, batches, **_):
        return np.array([[[weights(path)] * 4 for path in paths]] * 2)

    clock, before = matrices.Clock, []
    monkeypatch.setattr(layer_clock, "in_turns", in_turns)
    monkeypatch.setattr(clock, "product", product)
    monkeypatch.setattr(
        clock, "model", lambda self, context: before.append(weights(context.input_graph)) or before[-1]
    )
    data = place / "data"
    report = run("lowrank", place / "model", tmp_path / "out", data, LowRankOptions(target_speedup=1.3))
    found = report.method.detail["target_speedup"]
    assert found["tries"][0]["measured"] > 1.5  # twice the saving that was predicted
    assert found["measured"] == pytest.approx(1.3, rel=0.03)
    assert before[0] / weights(tmp_path / "out" / "model.onnx") == pytest.approx(found["measured"], rel=1e-9)
    assert "speedup-missed" not in {w.code for w in report.warnings}
    with pytest.raises(UsageError, match=r"--target-speedup 90 cannot be met: .* is the most"):
        run("lowrank", place / "model", tmp_path / "no", data, LowRankOptions(target_speedup=90.0))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_speedup_of_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcli.stages.lowrank import convolutions

    def clock(layer, x) -> float:
        """Milliseconds as weights of the convolutions, and as many elsewhere as the dense ones have."""
        if isinstance(layer, FactorisedConv | torch.nn.Conv1d):
            return sum(p.numel() for p in layer.parameters()) / 1000
        return 2 * whole

    whole = sum(p.numel() for p in cnn().model.convolutions.parameters()) / 1000
    monkeypatch.setattr(convolutions, "torch_milliseconds", clock)

    def measure(context, made) -> Speed:
        spent = sum(p.numel() for p in made.model.convolutions.parameters()) / 1000
        return Speed(2 * whole / (2 * whole - 0.8 * (whole - spent)), 0.0)

    monkeypatch.setattr(speedup, "against_input", measure)
    made = cnn()
    applied = contexts.applied(lowrank, context_of(made, tmp_path, method="tucker2", target_speedup=1.3))
    found = applied.method.detail["target_speedup"]
    assert [row["measured"] >= 1.274 for row in found["tries"]] == [False, True]
    assert measure(None, made).value == found["measured"] == pytest.approx(1.3, rel=0.05)
    assert applied.warnings == []
    # Twice the time is spent, half of it elsewhere, and a fifth of what is saved is lost.
    with pytest.raises(UsageError, match=r"--target-speedup 1\.8 cannot be met: .* 1\.6. times as fast"):
        contexts.applied(lowrank, context_of(cnn(), tmp_path, method="tucker2", target_speedup=1.8))
