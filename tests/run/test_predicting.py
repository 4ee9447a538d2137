"""``kdcli predict`` gives the answers that ``kdcli evaluate`` judges, whatever the task, the batch and the source."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

import kdcli
from kdcli import tasks
from kdcli.cli.app import main
from kdcli.errors import InputError, UsageError
from kdcli.models import inspect
from kdcli.tasks.multi_label import MultiLabel
from tests import tiny

ROOT = Path(kdcli.__file__).parents[1]
EMOTIONS = ["joy", "anger", "fear"]
TASKS = {
    "text-classification": (tiny.LABELS, tasks.get("text-classification")),
    "multi-label": (EMOTIONS, MultiLabel(thresholds=(0.3, 0.5, 0.8))),
    "regression": (["score"], tasks.get("regression")),
}


@dataclass
class Model:
    """An output of kdcli's with its graph, data to judge it on, and what ``evaluate`` says of it there."""

    path: Path
    data: Path
    rows: list[dict[str, object]]
    value: float


def _rows(name: str, rng: random.Random) -> list[dict[str, object]]:
    texts = [tiny.sentence(rng, i % 2 == 1) for i in range(48)]
    if name == "regression":
        return [
            {"text_a": text, "text_b": rng.choice(texts), "label": round(rng.random(), 3)} for text in texts
        ]
    if name == "multi-label":
        return [{"text": text, "labels": rng.sample(EMOTIONS, rng.randrange(4))} for text in texts]
    return [{"text": text, "label": tiny.LABELS[i % 2]} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    base = tmp_path_factory.mktemp("predict")
    found = {}
    for name, (labels, task) in TASKS.items():
        rows = _rows(name, random.Random(1))
        data = base / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        model, out = tiny.of_task(base / f"{name}-plain", task, labels), base / name
        report = kdcli.evaluate(model, data=data, out=out, batch_size=1)
        assert report.after.quality is not None
        found[name] = Model(out, data, rows, report.after.quality.main.value)
    return found


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[dict[str, object]], str]]:
    """Run ``kdcli predict``: exit code, answers, stderr."""

    def run(
        *words: object, stdin: str = "", terminal: bool = False
    ) -> tuple[int, list[dict[str, object]], str]:
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit) as stop:
            main(["predict", *map(str, words)])
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), [json.loads(line) for line in out.splitlines()], err

    return run


def test_the_answers_are_those_that_evaluate_judges(models: dict[str, Model], call: Callable) -> None:
    one, many, number = (models[name] for name in TASKS)
    code, answers, err = call(one.path, one.data)
    assert code == 0
    assert "48 rows" in err
    assert (
        np.mean([a["label"] == row["label"] for a, row in zip(answers, one.rows, strict=True)]) == one.value
    )
    assert all(0.5 <= answer["score"] <= 1 for answer in answers)
    _, answers, _ = call(many.path, many.data)
    truth = [[name in row["labels"] for name in EMOTIONS] for row in many.rows]  # type: ignore[operator]
    given = [[name in answer["labels"] for name in EMOTIONS] for answer in answers]
    # As far as scikit-learn's sums and kdcli's round differently.
    assert metrics.f1_score(truth, given, average="micro") == pytest.approx(many.value, abs=1e-12)
    for answer in answers:
        above = [name for name, limit in zip(EMOTIONS, (0.3, 0.5, 0.8), strict=True)
                 if answer["scores"][name] >= limit]  # fmt: skip
        assert answer["labels"] == above
    _, answers, _ = call(number.path, number.data)
    scores = [answer["score"] for answer in answers]
    wanted = stats.spearmanr(scores, [row["label"] for row in number.rows]).statistic
    assert wanted == pytest.approx(number.value, abs=1e-12)


def test_an_answer_depends_on_no_other_row(models: dict[str, Model], tmp_path: Path) -> None:
    texts = [str(row["text"]) for row in models["text-classification"].rows]
    int8 = kdcli.quantize(models["text-classification"].path, out=tmp_path / "int8", offline=True,
                          data=models["text-classification"].data.parent / "split")  # fmt: skip
    for path, tolerance in ((int8.directory, 0.0), (models["text-classification"].path, 1e-6)):
        together = kdcli.predict(path, texts, batch_size=7)
        alone = [kdcli.predict(path, [text])[0] for text in texts[:5]]
        turned = kdcli.predict(path, texts[::-1], batch_size=48)[::-1]
        for others in (alone, turned):
            for a, b in zip(together, others, strict=False):
                assert a["label"] == b["label"]
                # Another kernel of the matrix product may sum a float batch in another order; integers have one.
                assert a["score"] == pytest.approx(b["score"], abs=tolerance, rel=0)


@pytest.fixture(autouse=True, scope="module")
def _split(models: dict[str, Model]) -> None:
    tiny.write_data(models["text-classification"].data.parent / "split")


def test_sources_and_runtimes_agree(models: dict[str, Model], call: Callable, tmp_path: Path) -> None:
    model = models["text-classification"]
    _, answers, _ = call(model.path, model.data)
    texts = "".join(f"{row['text']}\n" for row in model.rows)
    assert call(model.path, stdin=texts)[1] == answers
    assert call(model.path, "-", stdin=model.data.read_text(encoding="utf-8"))[1] == answers
    assert call("-", model.data, stdin=f"{model.path}\n")[1] == answers
    assert call(model.path / "model.onnx", model.data)[1] == answers
    out = tmp_path / "new" / "answers.jsonl"
    with pytest.raises(json.JSONDecodeError):  # stdout has the path
        call(model.path, model.data, "-o", out)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == answers
    by_torch = call(model.path, model.data, "--runtime", "torch")[1]
    for a, b in zip(by_torch, answers, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)  # two implementations of float32


def test_top_gives_the_best_labels(models: dict[str, Model], call: Callable) -> None:
    for name, key in (("text-classification", "label"), ("multi-label", "labels")):
        _, answers, _ = call(models[name].path, "--top", "2", stdin="a good film\na dull plot\n")
        for answer in answers:
            scores = list(answer["scores"].values())
            assert len(scores) == 2
            assert scores == sorted(scores, reverse=True)
            assert key in answer
    code, answers, err = call(models["regression"].path, "--top", "2", stdin='{"text_a": "a", "text_b": "b"}')
    assert (code, answers) == (2, [])
    assert "is a number" in err


def test_what_cannot_be_answered_is_said(models: dict[str, Model], call: Callable, tmp_path: Path) -> None:
    model = models["text-classification"].path
    code, answers, err = call(model, stdin='{"text": "a"}\n{"text": null}\n')
    assert (code, answers) == (3, [])
    assert "stdin, line 2" in err
    # What stands before a bad row of a later part has been answered.
    code, answers, err = call(model, stdin='{"text": "a"}\n' * 1024 + "oops\n")
    assert (code, len(answers)) == (3, 1024)
    assert "stdin, line 1025: not JSON" in err
    assert call(model, stdin="")[:2] == (0, [])
    code, _, err = call(model, terminal=True)
    assert (code, "no texts" in err) == (2, True)
    code, _, err = call("-", stdin="a\n")
    assert (code, "predict - FILE" in err) == (2, True)
    assert call(model, tmp_path / "none.csv")[0] == 3
    assert call(model, "--batch-size", "0")[0] == 2
    assert call(model, "--runtime", "onyx", stdin="a")[0] == 2
    rows = tmp_path / "rows.txt"
    rows.write_text("a\n", encoding="utf-8")
    assert call(model, rows, "--output", rows)[0] == 2
    with pytest.raises(UsageError, match="is a list"):
        kdcli.predict(model, "a good film")
    plain = tiny.saved(tmp_path / "bare", layers=1)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    from safetensors.torch import load_file, save_file

    kept = {k: v for k, v in load_file(plain / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(InputError, match="no head"):
        kdcli.predict(plain, ["a"])
    told = inspect.describe(str(plain))
    assert (told["task"], told["possible"]) == (None, ["distill"])


def test_inspect_names_task_metric_and_thresholds(models: dict[str, Model]) -> None:
    for name, (labels, task) in TASKS.items():
        told = inspect.describe(str(models[name].path))
        assert (told["task"], told["metric"], told["labels"]) == (name, task.primary, labels)
        assert told["possible"][:2] == ["distill", "prune"]
        thresholds = dict(zip(labels, (0.3, 0.5, 0.8), strict=True)) if name == "multi-label" else None
        assert told.get("thresholds") == thresholds


def test_answers_come_while_texts_are_still_written(models: dict[str, Model]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", "predict", str(models["text-classification"].path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("a good film", "a dull plot"):
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["label"] in tiny.LABELS
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    process.communicate()


def test_a_reader_that_has_seen_enough_ends_it_quietly(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as stop:
            main(["predict", str(models["multi-label"].path), str(models["multi-label"].data)])
    assert (stop.value.code or 0, capfd.readouterr().err) == (0, "")
