"""Distill end to end on a tiny teacher: what is written, reported, cached and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from kdcli.errors import InputError, UsageError
from kdcli.models import checkpoint as checkpoints
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.request import Common, Gates, Request
from kdcli.run import life
from kdcli.run.outcome import Outcome
from kdcli.stages.distill.options import DistillOptions
from tests import tiny


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def request(teacher: Path, data: Path, out: Path, common: dict | None = None, **options) -> Request:
    options = {"student": "1x16", "epochs": 3, "lr": 5e-3, "init": "teacher", "augment": 0} | options
    return Request(
        stage="distill",
        model=None,
        options=DistillOptions(teachers=(str(teacher),), **options),
        common=Common(out=out, data=str(data), **(common or {})),
        argv=("kdcli", "distill"),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers checkpoint with a head of its own."""
    return tiny.saved(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def distilled(teacher: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The plain run, with a cache of its own, for the tests that only look at it."""
    base = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        outcome = life.run(request(teacher, data_dir, base / "student"), Progress())
    assert outcome is not None
    assert outcome.path == base / "student"
    return outcome


def test_the_output_directory_is_complete_and_plain(distilled: Outcome, data_dir: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    out, outcome = distilled.path, distilled
    names = {p.name for p in out.iterdir()}
    expected = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "kdcli.json",
        "model.onnx",
        "report.json",
    }
    assert expected | {"README.md"} <= names
    assert not list(out.parent.glob(".*"))  # neither temporary directory nor resume point is left
    report = io.read(out)
    assert report == outcome.report
    assert report.complete
    assert [entry.stage for entry in report.lineage] == ["input", "distill"]
    for artifact in report.artifacts:
        assert io.sha256_of(out / artifact.path) == artifact.sha256
    # Somebody else's code: the tokenizer and onnxruntime alone give the accuracy in the report.
    tok = Tokenizer.from_file(str(out / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    config = json.loads((out / "config.json").read_text())
    right = 0
    with (data_dir / "test.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        encoded = tok.encode(row["text"])
        feed = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        given = {i.name: np.array([feed[i.name]], dtype=np.int64) for i in session.get_inputs()}
        answer = int(session.run(None, given)[0].argmax())
        right += config["id2label"][str(answer)] == row["label"]
    assert report.after.quality is not None
    assert right / len(rows) == report.after.quality.accuracy.value
    # Plain transformers gives the logits that kdcli gives.
    ours = checkpoints.load(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    batch = tiny.batch()
    with torch.no_grad():
        assert torch.allclose(theirs(**batch).logits, ours.model(**batch).logits, atol=1e-6)


def test_same_seed_same_bytes(distilled: Outcome, teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    life.run(request(teacher, data_dir, tmp_path / "again"), Progress())
    for file in ("model.safetensors", "model.onnx", "config.json", "tokenizer.json"):
        assert (distilled.path / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_teacher_without_head_is_fine_tuned_once(data_dir: Path, tmp_path: Path) -> None:
    headless = tmp_path / "encoder"
    made = tiny.untrained()
    made.model.bert.save_pretrained(headless)
    made.tokenizer.save_pretrained(headless)
    settings = {"settings": {"teacher_epochs": "8", "teacher_lr": "5e-3", "teacher_batch_size": "16"}}
    first, second = Notes(), Notes()
    one = life.run(request(headless, data_dir, tmp_path / "a", settings), first)
    life.run(request(headless, data_dir, tmp_path / "b", settings), second)
    assert any("fine-tuning it first" in line for line in first.lines)
    assert any("from the cache" in line for line in second.lines)
    assert not any("fine-tuning it first" in line for line in second.lines)
    assert one.report.method is not None
    assert one.report.method.detail["teacher"]["fine_tuned"] is True
    assert one.report.before is not None
    assert one.report.before.quality is not None
    assert one.report.before.quality.accuracy.value >= 0.9  # it really learned the task
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    other = dict(settings["settings"], teacher_epochs="1")
    third = Notes()
    life.run(request(headless, data_dir, tmp_path / "c", {"settings": other}), third)
    assert any("fine-tuning it first" in line for line in third.lines)  # another recipe is another teacher
    fourth = Notes()
    by_f1 = request(headless, data_dir, tmp_path / "d", {"settings": other, "metric": "macro_f1"})
    life.run(by_f1, fourth)
    # The metric chooses the epoch, and stays with the teacher: without it another run would be judged by it.
    assert any("fine-tuning it first" in line for line in fourth.lines)


def test_the_student_learns_from_a_good_teacher_without_any_label(data_dir: Path, tmp_path: Path) -> None:
    headless = tmp_path / "encoder"
    made = tiny.untrained()
    made.model.bert.save_pretrained(headless)
    made.tokenizer.save_pretrained(headless)
    common = {"settings": {"teacher_epochs": "12", "teacher_lr": "5e-3", "teacher_batch_size": "16"}}
    outcome = life.run(
        request(
            headless, data_dir, tmp_path / "out", common, student="1x32", alpha=1.0, epochs=12, batch_size=16
        ),
        Progress(),
    )
    quality = outcome.report.after.quality
    assert quality is not None
    assert quality.accuracy.value >= 0.85


def test_label_budget_unlabelled_rows_and_control(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    texts = tmp_path / "more.txt"
    texts.write_text("a good film\nthe plot was dull\nquite superb\n")
    outcome = life.run(
        request(teacher, data_dir, tmp_path / "out", labels=10, unlabeled=texts, control=True), Progress()
    )
    assert outcome.report.method is not None
    detail = outcome.report.method.detail
    # 10 of 96 training rows are 3 of 32 validation rows.
    assert detail["rows"] == {"labelled": 10, "unlabelled": 96 - 10 + 3, "augmented": 0, "choosing": 3}
    assert [run["name"] for run in detail["control"]["runs"]] == ["labels", "labels+dropout"]
    assert detail["control"]["accuracy"] == max(run["accuracy"] for run in detail["control"]["runs"])
    assert any(w.code == "teacher-labels" for w in outcome.report.warnings)  # it came trained
    assert outcome.report.after.quality is not None
    # torch and onnxruntime agree on every answer here, so the control's reference is the report's own number.
    assert detail["control"]["student_accuracy"] == pytest.approx(outcome.report.after.quality.accuracy.value)


def test_a_missed_gate_keeps_the_output(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    gates = Gates(expressions=("accuracy>=1.01",))
    outcome = life.run(request(teacher, data_dir, tmp_path / "out", {"gates": gates}), Progress())
    assert outcome.report.exit_code == 4
    assert io.read(tmp_path / "out").exit_code == 4


def test_another_family_can_teach(data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tok = tiny.tokenizer()
    config = AutoConfig.for_model(
        "convbert",
        vocab_size=len(tok),
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=42,
        pad_token_id=0,
        id2label=dict(enumerate(tiny.LABELS)),
        label2id={name: i for i, name in enumerate(tiny.LABELS)},
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "teacher")
    tok.save_pretrained(tmp_path / "teacher")
    outcome = life.run(request(tmp_path / "teacher", data_dir, tmp_path / "out"), Progress())
    assert outcome.report.model.family == "bert"
    with pytest.raises(InputError, match="cannot operate on models of type 'convbert'"):
        _ = checkpoints.load(tmp_path / "teacher").family


@pytest.mark.parametrize(
    ("options", "common", "error", "words"),
    [
        ({"student": "tini"}, {}, UsageError, "did you mean 'tiny'"),
        ({"student": "0x16"}, {}, UsageError, "out of range"),
        ({"methods": ("respons",)}, {}, UsageError, "did you mean 'response'"),
        ({"strategy": "layer-wise"}, {}, UsageError, "did you mean 'layerwise'"),
        ({"alpha": 1.5}, {}, UsageError, "at most 1"),
        ({"beta": 1.0}, {}, UsageError, "--beta weighs feature methods, and none was chosen"),
        ({"labels": 1}, {}, UsageError, "out of range"),
        ({}, {"settings": {"temperatur": "3"}}, UsageError, "did you mean 'temperature'"),
        ({}, {"settings": {"temperature": "-1"}}, UsageError, "temperature"),
    ],
)
def test_bad_options_stop_before_any_work(
    teacher: Path, data_dir: Path, tmp_path: Path, options: dict, common: dict, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        life.run(request(teacher, data_dir, tmp_path / "out", common, **options), Progress())
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_an_output_that_exists_is_never_lost(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError):
            life.run(request(teacher, data_dir, taken, {"force": force}), Progress())
    with pytest.raises(UsageError, match="contain each other"):
        life.run(request(teacher, data_dir, teacher / "inside", {"force": True}), Progress())
    assert (taken / "thesis.txt").read_text() == "years of work"
