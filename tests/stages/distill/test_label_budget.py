"""``--labels N`` bounds every label that is seen: those that teach and those that choose."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.progress import Progress
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.distill import lesson
from kdcli.stages.distill import stage as distill
from kdcli.stages.distill.options import DistillOptions
from kdcli.tasks.multi_label import MultiLabel
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("teacher") / "teacher")


def run(teacher: Path, data: Path, out: Path, labels: int | None):
    request = Request(
        stage="distill",
        model=None,
        options=DistillOptions(
            teachers=(str(teacher),), student="1x16", epochs=1, init="teacher", augment=0, labels=labels
        ),
        common=Common(out=out, data=str(data), settings={"phases": "one"}),
        argv=("kdcli", "distill"),
    )
    outcome = life.run(request, Progress())
    assert outcome is not None
    return outcome.report


@pytest.mark.parametrize(
    ("labels", "train", "validation", "classes", "expected"),
    [
        (1000, 15000, 3000, 150, 200),  # the same share of both
        (150, 15000, 3000, 150, 150),  # a row a class
        (200, 15000, 3000, 150, 150),
        (15000, 15000, 3000, 150, 3000),
        (10, 100, 5000, 2, 10),  # never more than teach
        (100, 1000, 20, 4, 4),
    ],
)
def test_how_many_validation_rows_choose(
    labels: int, train: int, validation: int, classes: int, expected: int
) -> None:
    assert distill.choosing(labels, train, validation, classes) == expected


def test_as_few_rows_choose_and_all_of_them_are_measured(
    teacher: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    (data / "test.csv").unlink()  # what is measured and what chooses is now the same file
    seen: list[np.ndarray] = []
    real = lesson.run_fit

    def run_fit(context, *args, **more):
        seen.append(context.encoded["validation"].labels)
        return real(context, *args, **more)

    monkeypatch.setattr(lesson, "run_fit", run_fit)
    report = run(teacher, data, tmp_path / "out", 24)
    assert [len(labels) for labels in seen] == [8]  # 24 of 96 rows teach, 8 of 32 choose
    assert np.bincount(seen[0]).tolist() == [4, 4]  # every label in proportion
    assert report.method.detail["rows"]["choosing"] == 8
    for measured in (report.before, report.after):
        assert measured.quality.accuracy.n == 32


def test_a_teacher_that_is_fine_tuned_first_sees_no_more_labels_than_its_student(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headless = tmp_path / "encoder"
    made = tiny.untrained()
    made.model.bert.save_pretrained(headless)
    made.tokenizer.save_pretrained(headless)
    seen = []
    real = distill.teachers.fine_tuned

    def fine_tuned(context, *args):
        seen.append([int((context.encoded[split].labels >= 0).sum()) for split in ("train", "validation")])
        return real(context, *args)

    monkeypatch.setattr(distill.teachers, "fine_tuned", fine_tuned)
    report = run(headless, data_dir, tmp_path / "out", 24)
    assert seen == [[24, 8]]
    assert not any(w.code == "teacher-labels" for w in report.warnings)


def test_a_student_that_reads_other_tokens_decides_by_as_few_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["joy", "anger", "fear"]
    rng = random.Random(0)
    data = tmp_path / "data.jsonl"
    rows = [
        {"text": tiny.sentence(rng, i % 2 == 1), "labels": rng.sample(names, 1 + i % 2)} for i in range(200)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    load, decided, seen = life.checkpoints.load, life.measurement.decided, []

    def loaded(path: Path, **how: Any) -> Any:
        made = load(path, **how)
        if how.get("in_file"):
            made.tokenizer.add_tokens(["unheard-of"])
        return made

    def recorded(checkpoint: Any, rows: Any, *more: Any, **how: Any) -> Any:
        seen.append(rows.labels)
        return decided(checkpoint, rows, *more, **how)

    monkeypatch.setattr(life.checkpoints, "load", loaded)
    monkeypatch.setattr(life.measurement, "decided", recorded)
    report = run(tiny.of_task(tmp_path / "teacher", MultiLabel(), names), data, tmp_path / "out", 40)
    count = report.method.detail["rows"]["choosing"]
    assert count == 5  # of 20 validation rows the share that 40 of 160 is
    assert {len(labels) for labels in seen} == {count}
    assert report.after.quality.main.n == 20  # measured on all rows of test


def test_what_a_trained_teacher_saw_is_said(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    (warning,) = [
        w for w in run(teacher, data_dir, tmp_path / "a", 24).warnings if w.code == "teacher-labels"
    ]
    assert "the teacher came trained" in warning.message
    assert not any(w.code == "teacher-labels" for w in run(teacher, data_dir, tmp_path / "b", None).warnings)
