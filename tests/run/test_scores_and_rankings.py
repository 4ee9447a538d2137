"""A model of scores and a reranker through three stages: every number by onnxruntime and others alone."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from scipy import special, stats
from sklearn import metrics
from tokenizers import Tokenizer

import kdcli
from kdcli.errors import InputError
from kdcli.models.checkpoint import save
from kdcli.report.schema import Report
from kdcli.tasks.regression import Regression
from tests import tiny


@dataclass
class Place:
    """A model of one kind, and data to train and judge it on."""

    model: Path
    data: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those that it is judged on."""
        return [json.loads(line) for line in (self.data / "test.jsonl").read_text().splitlines()]


def _model(path: Path, task: Regression) -> Path:
    made = tiny.checkpoint(hidden=16, neurons=24)
    made.config.num_labels = 1
    torch.manual_seed(0)
    made.model.classifier = torch.nn.Linear(16, 1)
    made.model.num_labels = 1
    made.labels, made.task = ["score"], task
    path.mkdir()
    save(made, path)
    return path


def _data(path: Path, ranked: bool) -> Path:
    rng = random.Random(0)
    path.mkdir()
    for split, count in (("train", 64), ("validation", 60), ("test", 60)):
        with (path / f"{split}.jsonl").open("w") as stream:
            for i in range(count):
                one, other = (tiny.sentence(rng, rng.random() < 0.5) for _ in range(2))
                row: dict[str, Any] = {"text_a": one, "text_b": other, "label": round(rng.gauss(2, 1), 2)}
                if ranked:
                    row = {
                        "query": f"film {i % 12}",
                        "passage": other,
                        "label": rng.choice([0.0, 0.0, 0.5, 1.0]),
                    }
                stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module", params=["scores", "rankings"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    base, ranked = tmp_path_factory.mktemp(request.param), request.param == "rankings"
    task = Regression("ndcg_at_10", "sigmoid") if ranked else Regression("rmse")
    return Place(_model(base / "model", task), _data(base / "data", ranked))


def alone(directory: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics by onnxruntime, tokenizers, SciPy and scikit-learn, one row at a time."""
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    x = np.empty(len(rows))
    for i, row in enumerate(rows):
        e = tok.encode(row.get("query") or row["text_a"], row.get("passage") or row["text_b"])
        feed = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        x[i] = session.run(None, {k.name: np.array([feed[k.name]]) for k in session.get_inputs()})[0][0, 0]
    if session.get_modelmeta().custom_metadata_map["activation"] == "sigmoid":
        x = special.expit(x)
    y = np.array([row["label"] for row in rows], np.float32).astype(np.float64)
    found = {
        "spearman": stats.spearmanr(x, y).statistic,
        "pearson": stats.pearsonr(x, y).statistic,
        "rmse": metrics.root_mean_squared_error(y, x),
        "r2": metrics.r2_score(y, x),
    }
    lists = defaultdict(list)
    for i, row in enumerate(rows):
        if "query" in row:
            lists[row["query"]].append(i)
    counted = [at for at in lists.values() if y[at].any()]
    if counted:
        found["ndcg_at_10"] = np.mean([metrics.ndcg_score(y[None, at], x[None, at], k=10) for at in counted])
        best = [y[at][np.argsort(-x[at])] > 0 for at in counted]
        found["mrr_at_10"] = np.mean([1 / (1 + int(np.argmax(one))) for one in best])  # five rows a query
    return {name: float(value) for name, value in found.items()}


def check(report: Report, out: Path, rows: list[dict[str, Any]]) -> None:
    assert report.after.quality is not None
    found = alone(out, rows)
    assert report.after.quality.primary in found
    for name, value in found.items():
        # Sums of doubles in another order, of logits that are float32 in batches of other shapes.
        assert report.after.quality.metrics[name].value == pytest.approx(value, abs=2e-6), name
    assert report.after.quality.main.stderr is not None
    assert report.delta.ci95 is not None


def test_every_stage_reports_what_others_measure(place: Place, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": place.data, "seed": 0}
    pruned = kdcli.prune(place.model, sparsity=0.4, out=tmp_path / "pruned", **how)
    check(pruned, tmp_path / "pruned", place.rows)
    thin = kdcli.lowrank(tmp_path / "pruned", budget=0.7, out=tmp_path / "thin", **how)
    check(thin, tmp_path / "thin", place.rows)
    int8 = kdcli.quantize(tmp_path / "thin", out=tmp_path / "int8", **how)
    check(int8, tmp_path / "int8", place.rows)
    # What one stage leaves is what the next one starts from, and the metric stays with the model.
    for before, after in ((pruned, thin), (thin, int8)):
        assert after.before is not None
        assert after.before.quality == before.after.quality
    answers = kdcli.predict(
        tmp_path / "int8",
        [(r.get("query") or r["text_a"], r.get("passage") or r["text_b"]) for r in place.rows],
    )
    y = [row["label"] for row in place.rows]
    assert int8.after.quality is not None
    assert stats.spearmanr([one["score"] for one in answers], y).statistic == pytest.approx(
        int8.after.quality.metrics["spearman"].value, abs=2e-6
    )


def test_searches_judge_whole_queries_and_show_the_metric_as_it_is(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.stages.lowrank.search.JUDGED_ROWS", 22)
    # Anything goes, also where the metric has the unit of the labels.
    limit: dict[str, Any] = (
        {"max_drop": 1.0} if "query" in place.rows[0] else {"max_drop": 100.0, "metric": "rmse"}
    )
    report = kdcli.lowrank(place.model, out=tmp_path / "out", data=place.data, **limit)
    assert report.method is not None
    found = report.method.detail["search"]
    ranked = "query" in place.rows[0]
    assert found["rows"] == (20 if ranked else 22)  # five rows a query
    assert report.before is not None
    metric = report.before.quality.primary
    values = [found[metric], *(step[metric] for step in found["steps"] if step[metric] is not None)]
    assert len(values) > 1
    assert all(value > 0 for value in values)


def test_teachers_of_numbers_are_averaged_whatever_their_output_is_called(tmp_path: Path) -> None:
    place = Place(_model(tmp_path / "model", Regression("rmse")), _data(tmp_path / "data", False))
    other = _model(tmp_path / "other", Regression())
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (other / "config.json").write_text(json.dumps(config))
    headless = tmp_path / "headless"
    made = tiny.untrained(hidden=16, neurons=24)
    made.model.bert.save_pretrained(headless)
    made.tokenizer.save_pretrained(headless)
    how: dict[str, Any] = {"student": "1x16", "epochs": 1, "augment": 0, "data": place.data}
    how["set"] = {"phases": "one", "teacher_epochs": 1}
    report = kdcli.distill(teacher=[place.model, other, headless], out=tmp_path / "out", **how)
    check(report, tmp_path / "out", place.rows)
    sigmoid = _model(tmp_path / "sigmoid", Regression("rmse", "sigmoid"))
    with pytest.raises(InputError, match=r"read through a different activation \(sigmoid\)"):
        kdcli.distill(teacher=[place.model, sigmoid], out=tmp_path / "no", **how)
