"""Students without a transformer go through the same commands: distill, quantize, evaluate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from safetensors.torch import load_file
from tokenizers import Tokenizer

from kdcli.errors import InputError
from kdcli.models.aliases import SMALL_STUDENTS
from kdcli.progress import Progress
from kdcli.report.schema import Report
from kdcli.request import Common, Request
from kdcli.run import dry_run, life
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


def distill(teacher: Path, data: Path, out: Path, student: str, **options) -> Request:
    chosen = DistillOptions(
        teachers=(str(teacher),), student=student, lr=1e-2, batch_size=16, augment=0, **options
    )
    return Request(stage="distill", model=None, options=chosen, common=Common(out=out, data=str(data)))


def on(stage, model: Path, out: Path | None, options) -> Request:
    return Request(stage=stage, model=str(model), options=options, common=Common(out=out))


def accuracy(directory: Path, data: Path) -> float:
    """By onnxruntime and the tokenizer alone, one row at a time."""
    names = json.loads((directory / "config.json").read_text())["id2label"]
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [i.shape for i in session.get_inputs()] == [["batch", "sequence"]] * 2
    with (data / "test.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    right = 0
    for row in rows:
        e = tok.encode(row["text"])
        given = {"input_ids": np.array([e.ids]), "attention_mask": np.array([e.attention_mask])}
        right += names[str(int(session.run(None, given)[0].argmax()))] == row["label"]
    return right / len(rows)


def measured(report: Report) -> float:
    assert report.after.quality is not None
    return report.after.quality.accuracy.value


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("small")
    tiny.saved(base / "teacher")
    # Enough rows for every telling word to be met often: 20 of them decide the class.
    tiny.write_data(base / "data", {"train": 320, "validation": 40, "test": 40})
    return base


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_distill_quantize_and_evaluate(kind: str, places: Path) -> None:
    data, out, int8 = places / "data", places / kind, places / f"{kind}-int8"
    # Labels alone: the random teacher knows nothing.
    report = life.run(
        distill(places / "teacher", data, out, f"{kind}-16", epochs=8, alpha=0.0), Progress()
    ).report
    assert report.exit_code == 0
    assert report.model.family == f"kdcli-{kind}"
    assert measured(report) >= 0.9
    assert accuracy(out, data) == measured(report)
    assert report.parity is not None
    assert report.parity.passed
    assert report.after.compute is not None
    assert report.after.compute.macs > 0
    assert not [w for w in report.warnings if w.code == "not-fused"]
    assert report.method is not None
    assert report.method.detail["init"]["from"] == "teacher"

    small = life.run(on("quantize", out, int8, QuantizeOptions()), Progress()).report
    assert small.exit_code == 0
    assert measured(small) >= measured(report) - 0.05  # 2 of 40 rows
    assert accuracy(int8, data) == measured(small)
    stored = load_file(int8 / "model.safetensors")
    assert str(stored["word_embeddings.weight"].dtype) == "torch.int8"
    floats = {name for name, value in stored.items() if value.ndim > 1 and value.is_floating_point()}
    assert {n.split(".")[0] for n in floats if not n.endswith("_scale")} == {
        "static": set(),
        "cnn": {"convolutions"},
        "bilstm": {"forwards", "backwards"},
    }[kind]
    graph = onnx.load(str(int8 / "model.onnx")).graph
    table = (len(tiny.tokenizer()), 16)
    kinds = {t.data_type for t in graph.initializer if tuple(t.dims) == table}
    assert kinds == {TensorProto.INT8}

    chosen = EvaluateOptions(models=(str(int8), str(out)), runtime="both", batch_sizes=(1,))
    compared = life.run(Request(stage="evaluate", model=None, options=chosen), Progress())
    assert [measured(r) for r in compared.reports] == [measured(small), measured(report)]


def test_they_can_teach_each_other_and_an_encoder(places: Path) -> None:
    teacher, data = places / "teacher", places / "data"
    own = distill(teacher, data, places / "own", "static-8", epochs=1, strategy="self")
    assert life.run(own, Progress()).report.model.family == "kdcli-static"
    for student, family in (("cnn-8", "kdcli-cnn"), ("1x8", "bert")):
        taught = distill(places / "own", data, places / f"by-{student}", student, epochs=1)
        assert life.run(taught, Progress()).report.model.family == family


@pytest.mark.parametrize(
    ("stage", "options"),
    [("prune", PruneOptions(sparsity=0.5)), ("lowrank", LowRankOptions(budget=0.5))],
)
def test_stages_that_cut_encoders_refuse(stage, options, places: Path) -> None:
    out = places / "cnn-fresh"
    if not out.exists():
        request = distill(places / "teacher", places / "data", out, "cnn-8", epochs=1)
        life.run(request, Progress())
    with pytest.raises(InputError, match="'kdcli-cnn' has no heads") as caught:
        life.run(on(stage, out, places / "never", options), Progress())
    assert "kdcli quantize" in str(caught.value.hint)
    assert int(caught.value.exit_code) == 3
    assert not (places / "never").exists()


def test_a_dry_run_knows_their_size(places: Path) -> None:
    narrow, wide = (
        dry_run.plan(distill(places / "teacher", places / "data", places / "dry", name, epochs=2), Progress())
        for name in ("static-64", "static-256")
    )
    assert narrow.facts["student"] == "static-64"
    assert narrow.memory_bytes < wide.memory_bytes
    assert not (places / "dry").exists()
