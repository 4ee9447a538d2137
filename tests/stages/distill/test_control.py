"""The controls of a distillation: what they start from, what they read, and what is said about the gain."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.inputs.augment import Origins
from kdcli.inputs.text import Encoded, concatenate
from kdcli.progress import Progress
from kdcli.report import findings, html, markdown
from kdcli.request import Common, Request
from kdcli.run import dry_run, life
from kdcli.stages.distill import control
from kdcli.stages.distill.options import DistillOptions
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.multi_label import MultiLabel
from kdcli.training.loop import FitOptions
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


@dataclass
class Trained:
    """One training, as it began."""

    title: str
    weights: dict[str, torch.Tensor]
    dropout: float
    options: FitOptions
    rows: int
    steps: int


@dataclass
class Watch:
    trained: list[Trained] = field(default_factory=list)

    def of(self, start: str) -> list[Trained]:
        return [one for one in self.trained if one.title.startswith(start)]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Every training that a stage starts, with the weights it starts from."""
    from kdcli.stages.distill import lesson

    found = Watch()
    real = lesson.run_fit

    def run_fit(context, trained, rows, loss, options, title, **more) -> Any:
        weights = {k: v.clone() for k, v in trained.model.state_dict().items()}
        rate = control.dropout_of(trained.model)
        result = real(context, trained, rows, loss, options, title, **more)
        found.trained.append(Trained(title, weights, rate, options, len(rows), result.steps))
        return result

    monkeypatch.setattr(lesson, "run_fit", run_fit)
    monkeypatch.setattr(control, "run_fit", run_fit)
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("teacher") / "teacher")


def request(teacher: Path, data: Path, out: Path, settings: dict | None = None, **options) -> Request:
    given = {"student": "1x16", "epochs": 2, "lr": 5e-3, "init": "teacher", "augment": 2, "control": True}
    return Request(
        stage="distill",
        model=None,
        options=DistillOptions(teachers=(str(teacher),), **(given | options)),
        common=Common(out=out, data=str(data), settings={"phases": "one"} | (settings or {})),
        argv=("kdcli", "distill"),
    )


def distill(teacher: Path, data: Path, out: Path, settings: dict | None = None, **options):
    outcome = life.run(request(teacher, data, out, settings, **options), Progress())
    assert outcome is not None
    return outcome.report


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_controls_start_from_the_students_first_weights(
    teacher: Path, data_dir: Path, tmp_path: Path, watch: Watch
) -> None:
    report = distill(teacher, data_dir, tmp_path / "out")
    (student,), controls = watch.of("student"), watch.of("control")
    names = ["control", "control labels+texts", "control labels+texts+dropout"]
    assert [one.title for one in controls] == names
    assert all(same(one.weights, student.weights) for one in controls)
    assert student.dropout == 0.0
    assert [one.dropout for one in controls] == [0.0, 0.0, control.CONTROL_DROPOUT]
    runs = report.method.detail["control"]["runs"]
    further = report.method.detail["rows"]["augmented"]
    assert further > 0
    assert [run["further_texts"] for run in runs] == [0, further, further]
    # An epoch of a control is never under 50 steps here, so it has the student's steps to the next whole epoch.
    for one in controls:
        an_epoch = -(-one.rows // one.options.batch_size)
        assert one.steps == max(1, round(student.steps / an_epoch)) * an_epoch
    with_control = (report.method.detail["control"]["student_accuracy"], report.after.quality.accuracy.value)
    assert with_control[0] == pytest.approx(with_control[1])  # torch and onnxruntime agree on every row here


@pytest.mark.parametrize("strategy", ["self", "assistant-chain"])
def test_a_chains_control_starts_before_any_distillation(
    strategy: str, teacher: Path, data_dir: Path, tmp_path: Path, watch: Watch
) -> None:
    distill(teacher, data_dir, tmp_path / "plain", {"phases": "one"})
    (plain,) = watch.of("student")
    watch.trained.clear()
    report = distill(
        teacher, data_dir, tmp_path / "out", {"assistants": "1x24", "generations": "3"}, strategy=strategy
    )
    student, controls = watch.of("student")[0], watch.of("control")
    assert len(controls) == 3
    assert all(same(one.weights, plain.weights) for one in controls)
    if strategy == "self":
        assert not same(student.weights, plain.weights)  # a successor goes on from its predecessor
        accuracies = [one["validation_accuracy"] for one in report.method.detail["chain"]]
        generation = accuracies.index(max(accuracies)) + 1
        steps = generation * student.steps  # of all generations that led to the one that is kept
        for one in controls:
            an_epoch = -(-one.rows // one.options.batch_size)
            assert one.steps == max(1, round(steps / an_epoch)) * an_epoch


def test_a_student_with_dropout_and_no_further_texts_has_one_control(
    teacher: Path, data_dir: Path, tmp_path: Path, watch: Watch
) -> None:
    report = distill(teacher, data_dir, tmp_path / "out", {"dropout": "0.3"}, augment=0)
    assert [one.dropout for one in watch.trained] == [0.3, 0.3]
    assert [run["name"] for run in report.method.detail["control"]["runs"]] == ["labels"]


@pytest.mark.parametrize("student", ["1x16", "checkpoint"])
def test_a_dry_run_counts_the_controls(student: str, teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    student = str(teacher) if student == "checkpoint" else student
    many = {"student": student, "epochs": 10_000}  # so that the trainings are nearly all there is
    alone, both = (
        dry_run.plan(
            request(teacher, data_dir, tmp_path / "out", **many, control=control), Progress()
        ).seconds
        for control in (False, True)
    )
    assert both == pytest.approx(4 * alone, rel=0.1)


# ------------------------------------------------- what the second control learns


def rows(labels: list[int]) -> Encoded:
    """Rows of one token each: the row's own number."""
    count = len(labels)
    return Encoded(
        np.arange(count, dtype=np.int32),
        np.zeros(count, dtype=np.int8),
        np.arange(count + 1, dtype=np.int64),
        np.array(labels, dtype=np.int64),
    )


class Given:
    """The parts of a context and of a trained student that :func:`lessons` reads."""

    def __init__(self, train: Encoded) -> None:
        self.encoded, self.device = {"train": train}, torch.device("cpu")
        self.options = FitOptions(epochs=1, batch_size=1, lr=1e-3)
        self.checkpoint = self
        self.model = torch.nn.Dropout(0.0)
        self.task = CLASSIFICATION


def test_a_further_text_has_the_labels_of_its_rows_as_far_as_its_tokens_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "CONTROL_STEPS", 1)
    train = rows([0, 1, 2, -100])
    origins = Origins(
        np.array([0, 1, 2, 0, 3, 3]), np.array([0, 2, 0, 3, 1, 3]), np.array([1, 0.25, 0.0, 0.5, 0.0, 1])
    )
    given = Given(train)
    texts = control.Texts(concatenate(train, rows([-100] * 6), np.array([-100])), origins)
    _, second, third = control.lessons(given, given, texts)  # type: ignore[arg-type]
    assert third.rows is second.rows
    # Rows 0 to 2; the texts of 0 alone, of 1 and 2, of nothing but 0, of nothing but 1; none of which row 3 is part.
    assert second.further == 4
    assert second.rows.labels is not None
    assert second.rows.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert second.rows.ids.tolist() == [0, 1, 2, 0, 1, 2, 4]
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    batch = type("Batch", (), {"rows": np.arange(7)})
    got = second.loss(type("Output", (), {"logits": logits}), batch)
    targets = torch.zeros(7, 3)
    for row, label in enumerate([0, 1, 2, 0, 1, 0, 1]):
        targets[row, label] = 1.0
    targets[4] = torch.tensor([0, 0.25, 0.75])
    assert torch.allclose(got, F.cross_entropy(logits, targets))  # float32 sums of seven terms


# ------------------------------------------------- what is said


def compared(student: list[int], *controls: list[int]) -> tuple[dict, list]:
    measured = rows([0] * len(student))
    runs = [{"name": name} for name in ("labels", "labels+texts+dropout")[: len(controls)]]
    tasks = [CLASSIFICATION] * len(controls)
    return control.compare(
        CLASSIFICATION, np.eye(2)[student], tasks, [np.eye(2)[c] for c in controls], runs, measured
    )


def test_every_model_is_read_as_it_decided_for_itself() -> None:
    # All three order the rows alike; the control says less, and its own threshold makes up for that.
    labels = np.array([[1.0], [1.0], [0.0], [0.0]])
    measured = replace(rows([0] * 4), labels=labels)
    student, timid = np.array([[3.0], [2.0], [-2.0], [-3.0]]), np.array([[-1.0], [-2.0], [-4.0], [-5.0]])
    own, other = (MultiLabel().fitted(logits, labels) for logits in (student, timid))
    runs = [{"name": "labels"}, {"name": "labels+texts"}]
    found, _ = control.compare(own, student, [MultiLabel(), other], [timid, timid], runs, measured)
    assert found["student_micro_f1"] == 1
    assert [run["micro_f1"] for run in found["runs"]] == [0, 1]


def test_the_student_is_compared_with_the_better_control_row_by_row() -> None:
    right, wrong = [0], [1]
    student = right * 100
    weak, strong = right * 60 + wrong * 40, right * 90 + wrong * 10
    found, warnings = compared(student, weak, strong)
    assert found["best"] == "labels+texts+dropout"
    assert (found["student_accuracy"], found["accuracy"], found["rows"]) == (1.0, 0.9, 100)
    assert [round(run["gain"], 9) for run in found["runs"]] == [0.4, 0.1]
    # Ten rows won and none lost: 2 * 0.5^10 (McNemar's exact test).
    assert found["runs"][1]["p_value"] == pytest.approx(2 * 0.5**10)
    assert warnings == []


def test_no_gain_is_said_when_it_may_be_chance_or_is_a_loss() -> None:
    right, wrong = [0], [1]
    # Four won and none lost: p = 0.125.
    _, (warning,) = compared(right * 100, right * 50 + wrong * 50, right * 96 + wrong * 4)
    assert warning.code == "no-gain"
    assert (
        "without it the student reaches 96.00 % (accuracy), and 4.0 points are no more than noise"
        in warning.message
    )
    _, (warning,) = compared(right * 90 + wrong * 10, right * 50 + wrong * 50, right * 100)
    assert "without it the student reaches 100.00 % (accuracy), better by 10.0 points" in warning.message


def test_the_report_says_what_the_teacher_gives_wherever_it_is_shown(
    teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    report = distill(teacher, data_dir, tmp_path / "out", epochs=1, augment=1)
    said = findings.control_text(report)
    found = report.method.detail["control"]
    assert f"{100 * found['student_accuracy']:.2f} % distilled" in said
    assert f"{100 * found['runs'][0]['accuracy']:.2f} % with the labels alone" in said
    assert "with the labels and the same extra texts, " in said
    assert "with the labels, the same extra texts and dropout; " in said
    gain = 100 * (found["student_accuracy"] - max(run["accuracy"] for run in found["runs"]))
    assert f"the teacher gives {gain:+.2f} points over the best of them" in said
    whole = said[0].upper() + said[1:]
    assert whole in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert whole in markdown.table(report).replace("\\", "")
    assert html.page(report).count("Without the teacher") == 1
    broken = {"student_accuracy": 0.5, "runs": [{"accuracy": None}]}
    assert findings.control_words(broken) is None
    assert findings.control_words({"accuracy": 0.9, "student_accuracy": 0.9}) is None
