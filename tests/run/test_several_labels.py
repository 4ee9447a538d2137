"""Several labels a row through the stages: the report's numbers and thresholds are those of what ships, by
onnxruntime, the tokenizer and scikit-learn alone."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from scipy.special import expit
from sklearn import metrics
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

import kdcli
from kdcli.errors import InputError
from tests import tiny

NAMES = ["anger", "fear", "joy"]
TRUE = 0.3
"""The threshold by which the labels of the data are those of the model, but for every fifth row."""

STAGES: dict[str, dict[str, Any]] = {
    "prune": {"sparsity": 0.5, "method": "magnitude"},
    "lowrank": {"rank": 6, "method": "svd"},
    "quantize": {"scheme": "static-int8"},
}


@dataclass
class Place:
    """The same weights twice: as plain transformers saves them, and with a threshold; and data that they know."""

    foreign: Path
    decided: Path
    data: Path

    def rows(self, split: str) -> list[dict[str, Any]]:
        lines = (self.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("several")
    settings = tiny.config(layers=1, hidden=16, heads=2, neurons=24)
    settings.id2label, settings.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    settings.problem_type = "multi_label_classification"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(settings).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.4)
    tokens, rng = tiny.tokenizer(), random.Random(0)
    (base / "data").mkdir()
    for split, count in (("train", 16), ("validation", 60), ("test", 60)):
        texts = [tiny.sentence(rng, i % 2 == 1) for i in range(count)]
        with torch.no_grad():
            odds = model(**tokens(texts, padding=True, return_tensors="pt")).logits.sigmoid()
        rows = [
            {"text": text, "labels": [n for n, p in zip(NAMES, odds[i].tolist(), strict=True) if p >= TRUE]}
            for i, text in enumerate(texts)
        ]
        for row in rows[::5]:
            row["labels"] = rng.sample(NAMES, rng.randrange(len(NAMES)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (base / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    found = Place(base / "foreign", base / "decided", base / "data")
    for path in (found.foreign, found.decided):
        model.save_pretrained(path)
        tokens.save_pretrained(path)
        model.config.kdcli_thresholds = [0.9] * len(NAMES)  # of the second, and far from the best
    return found


def shipped(out: Path, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (N, C) and labels (N, C) of rows that go through the graph one by one, and its thresholds."""
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["task"], json.loads(about["labels"])) == ("multi-label", NAMES)
    tokens = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokens.no_padding()
    logits = []
    for row in rows:
        one = tokens.encode(row["text"])
        given = {"input_ids": one.ids, "attention_mask": one.attention_mask, "token_type_ids": one.type_ids}
        feeds = {put.name: np.array([given[put.name]]) for put in session.get_inputs()}
        logits.append(session.run(None, feeds)[0][0])
    labels = np.array([[name in row["labels"] for name in NAMES] for row in rows])
    return expit(np.array(logits, np.float64)), labels, np.array(json.loads(about["thresholds"]))


def run(stage: str, model: Path, place: Place, out: Path, **options: Any) -> Any:
    """One stage by its Python function."""
    given = STAGES.get(stage, {}) | {"data": place.data, "out": out, "offline": True} | options
    return getattr(kdcli, stage)(model, **given)


@pytest.mark.parametrize("stage", STAGES)
def test_the_reports_numbers_are_those_of_the_graph_at_thresholds_of_validation(
    stage: str, place: Place, tmp_path: Path
) -> None:
    report = run(stage, place.decided, place, tmp_path / "out")
    scores, truth, limits = shipped(tmp_path / "out", place.rows("test"))
    given = scores >= limits
    expected = {
        "micro_f1": metrics.f1_score(truth, given, average="micro"),
        "macro_f1": metrics.f1_score(truth, given, average="macro"),
        "subset_accuracy": metrics.accuracy_score(truth, given),
        "average_precision": metrics.average_precision_score(truth, scores, average="macro"),
    }
    quality = report.after.quality
    assert quality.primary == "micro_f1"
    # Sums in another order, in double precision.
    assert {name: one.value for name, one in quality.metrics.items()} == pytest.approx(expected, abs=1e-9)
    # The input's thresholds were far off; those of the output are as good on validation rows as any can be.
    scores, truth, limits = shipped(tmp_path / "out", place.rows("validation"))
    best = max(metrics.f1_score(truth, scores >= one, average="micro") for one in np.unique(scores))
    assert metrics.f1_score(truth, scores >= limits, average="micro") == pytest.approx(best, abs=1e-9)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["kdcli_thresholds"] == limits.tolist()
    assert config["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("stage", STAGES)
def test_a_foreign_model_without_thresholds_gets_none(stage: str, place: Place, tmp_path: Path) -> None:
    report = run(stage, place.foreign, place, tmp_path / "out")
    scores, truth, limits = shipped(tmp_path / "out", place.rows("test"))
    assert limits.tolist() == [0.5] * len(NAMES)
    micro = metrics.f1_score(truth, scores >= 0.5, average="micro")
    assert report.after.quality.main.value == pytest.approx(micro, abs=1e-9)
    assert "kdcli_thresholds" not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_a_model_that_does_not_say_what_it_is_for_can_be_told_so(place: Place, tmp_path: Path) -> None:
    silent = shutil.copytree(place.foreign, tmp_path / "silent")
    config = json.loads((silent / "config.json").read_text(encoding="utf-8"))
    del config["problem_type"]
    (silent / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # An option that the next run refuses would be no way out.
    for task, said in ((None, "has one of several classes"), ("multi-label", "is for text-classification")):
        with pytest.raises(InputError, match=said) as error:
            kdcli.evaluate(silent, data=place.data, task=task, offline=True)
        assert 'write "problem_type": "multi_label_classification" into its config.json' in str(
            error.value.hint
        )
        assert "--task multi-label" not in str(error.value.hint)


def test_teachers_without_a_head_learn_this_task_by_its_metric(place: Place, tmp_path: Path) -> None:
    bare = []
    for seed in (1, 2):
        made = tiny.untrained(layers=1, hidden=16, heads=2, neurons=24, seed=seed)
        bare.append(tmp_path / f"bare{seed}")
        made.model.bert.save_pretrained(bare[-1])
        made.tokenizer.save_pretrained(bare[-1])
    given = {"student": "1x16", "data": place.data, "epochs": 1, "augment": 0, "offline": True,
             "set": {"teacher_epochs": 1}}  # fmt: skip
    asked = kdcli.distill(teacher=bare[:1], metric="macro_f1", out=tmp_path / "asked", **given)
    assert asked.after.quality.primary == "macro_f1"
    # The teacher comes from the cache, where another metric had chosen it; a second one has no head either.
    two = kdcli.distill(teacher=bare, out=tmp_path / "two", **given)
    assert (two.before.quality.primary, two.after.quality.primary) == ("micro_f1", "micro_f1")
    scores, truth, limits = shipped(tmp_path / "two", place.rows("test"))
    micro = metrics.f1_score(truth, scores >= limits, average="micro")
    assert two.after.quality.main.value == pytest.approx(micro, abs=1e-9)


def test_teachers_of_two_tasks_are_refused(place: Place, tmp_path: Path) -> None:
    other = shutil.copytree(place.foreign, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["problem_type"] = "single_label_classification"
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"other' is for text-classification, .*foreign' is for multi-label"):
        kdcli.distill(
            teacher=[place.foreign, other],
            student="1x16",
            data=place.data,
            out=tmp_path / "out",
            offline=True,
        )
