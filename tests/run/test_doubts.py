"""What is said of numbers that mean less than they seem to: constant answers, and rows that chose."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from kdcli.cli import console as consoles
from kdcli.cli import table
from kdcli.progress import Progress
from kdcli.report import facts, html, markdown
from kdcli.report.schema import LineageEntry, Report
from kdcli.request import Common, Request
from kdcli.run import life, lineage
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.tasks.classification import CLASSIFICATION
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")

NAMES = ["negative", "positive"]


def logits(given: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[given]


@pytest.mark.parametrize(
    ("given", "truth", "codes"),
    [
        ([0] * 10, [0] * 9 + [1], {"one-answer"}),  # right on 90 % of the rows
        ([1] * 10, [0] * 9 + [1], {"one-answer"}),
        ([0] * 8 + [1, 0], [0] * 8 + [0, 1], {"majority"}),  # 80 %, and always 0 would be 90 %
        ([0] * 8 + [0, 1], [0] * 8 + [0, 1], set()),
        ([0] * 10, [0] * 10, {"one-label"}),
        ([1, 0] * 5, [0] * 10, {"one-label"}),
        ([0, 1] * 5, [0, 1] * 5, set()),
        ([0, 0, 1, 1], [0, 1, 0, 1], {"majority"}),  # half and half: no better than a coin
    ],
)
def test_answers_that_say_nothing(given: list[int], truth: list[int], codes: set[str]) -> None:
    found = CLASSIFICATION.doubts(logits(given), np.array(truth), NAMES)
    assert {w.code for w in found} == codes
    of_input = CLASSIFICATION.doubts(logits(given), np.array(truth), NAMES, of_input=True)
    assert {w.code.removeprefix("input-") for w in of_input} == codes
    assert not {w.code for w in of_input} & set(facts.ALARMS)


def test_the_rarer_of_many_labels_is_no_majority() -> None:
    truth = np.arange(150).repeat(2)
    given = truth.copy()
    given[::2] = (given[::2] + 1) % 150
    assert CLASSIFICATION.doubts(logits(given.tolist(), 150), truth, [str(i) for i in range(150)]) == []


def constant(place: Path) -> Path:
    """A checkpoint that always gives the first label."""
    made = tiny.checkpoint()
    made.model.classifier.weight.data.zero_()
    made.model.classifier.bias.data[:] = made.model.classifier.bias.data.new_tensor([1.0, 0.0])
    place.mkdir()
    made.config.architectures = [type(made.model).__name__]
    made.model.save_pretrained(place)
    made.tokenizer.save_pretrained(place)
    return place


def judge(model: Path, data: Path, **options) -> Report:
    given = EvaluateOptions(models=(str(model),), batch_sizes=(1,), **options)
    request = Request(stage="evaluate", model=None, options=given, common=Common(data=str(data)))
    return life.run(request, Progress()).report


def prune(model: Path, data: Path, out: Path, **options) -> Report:
    given = PruneOptions(sparsity=0.2, method="taylor", schedule="one-shot", **options)
    common = Common(data=str(data), out=out)
    outcome = life.run(Request(stage="prune", model=str(model), options=given, common=common), Progress())
    assert outcome is not None
    return outcome.report


def codes(report: Report) -> set[str]:
    return {w.code for w in report.warnings}


def test_a_constant_model_is_never_just_done(data_dir: Path, tmp_path: Path) -> None:
    report = judge(constant(tmp_path / "m"), data_dir)
    assert "one-answer" in codes(report)
    said = "the model gives every row the same answer"
    assert said in facts.verdict_text(report)
    assert "done" not in facts.verdict_text(report)
    assert said in markdown.table(report)
    assert f'<p class="verdict bad">BUT {said}' in html.page(report)
    assert any(line.startswith("WARNING") for line in table.of_report(report, consoles.Console()))
    after = prune(tmp_path / "m", data_dir, tmp_path / "out")
    assert {"one-answer", "input-one-answer"} <= codes(after)


def no_test(source: Path, place: Path) -> Path:
    place.mkdir()
    for name in ("train.csv", "validation.csv"):
        (place / name).write_bytes((source / name).read_bytes())
    return place


def test_rows_that_chose_are_not_judged_silently(data_dir: Path, tmp_path: Path) -> None:
    data, model = no_test(data_dir, tmp_path / "data"), tiny.saved(tmp_path / "m")
    code = "selected-on-measured-rows"
    plain = prune(model, data, tmp_path / "plain")
    assert code not in codes(plain)  # nothing was chosen
    trained = prune(model, data, tmp_path / "trained", epochs=2)
    assert code in codes(trained)
    assert "the epoch (prune)" in next(w.message for w in trained.warnings if w.code == code)
    assert code not in codes(prune(model, data_dir, tmp_path / "tested", epochs=2))  # there are test rows
    # What came before counts in every later step, and for whoever names the same rows again.
    later = prune(tmp_path / "trained", data, tmp_path / "later")
    assert code in codes(later)
    assert code in codes(judge(tmp_path / "later", data))
    assert code in codes(judge(tmp_path / "later", data / "validation.csv"))
    assert code in codes(judge(tmp_path / "tested", data_dir, split="validation"))
    assert code not in codes(judge(tmp_path / "tested", data_dir))


def test_what_a_stage_lets_the_rows_choose() -> None:
    def of(options, detail: dict | None = None) -> list[str]:
        stage = {DistillOptions: "distill", PruneOptions: "prune", LowRankOptions: "lowrank"}
        request = Request(stage=stage.get(type(options), "quantize"), model="m", options=options)
        return life.stage_of(request).chosen(request, detail or {})

    assert of(DistillOptions(teachers=("t",), student="tiny"))
    assert "the teacher's epoch" in of(
        DistillOptions(teachers=("t",), student="tiny"), {"teacher": {"fine_tuned": True}}
    )
    assert of(PruneOptions()) == of(LowRankOptions()) == of(QuantizeOptions()) == []
    assert of(PruneOptions(), {"search": {}}) == ["how much was removed"]
    assert of(PruneOptions(structure="vocab+heads")) == ["the tokens that stay"]
    assert of(PruneOptions(epochs=1)) == []  # one epoch is no choice
    assert of(PruneOptions(epochs=3, schedule="gradual")) == []  # and it ends where it ends
    assert of(LowRankOptions(epochs=2), {"search": {}}) == ["the budget", "the epoch"]
    assert of(QuantizeOptions(scheme="auto")) == ["the scheme"]
    assert of(QuantizeOptions(), {"search": {"kept": []}}) == []
    assert of(QuantizeOptions(), {"search": {"kept": ["a"]}}) == ["the layers that stay in float"]
    assert of(QuantizeOptions(epochs=2)) == ["the epoch"]


def test_only_the_rows_that_chose_are_meant() -> None:
    entry = LineageEntry(
        stage="prune",
        method="m",
        report_sha256=None,
        model="a",
        metric=None,
        value=None,
        params={},
        chosen=["the epoch"],
    )
    assert lineage.selected([entry.model_copy(update={"chosen_on": "a"})], "validation", "a")
    assert not lineage.selected([entry.model_copy(update={"chosen_on": "b"})], "validation", "a")
    assert not lineage.selected([entry], "validation", "a")


def test_one_label_alone_is_measured_and_said(data_dir: Path, tmp_path: Path) -> None:
    with (data_dir / "test.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["label"] == "negative"]
    with (tmp_path / "negative.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    report = judge(tiny.saved(tmp_path / "m"), tmp_path / "negative.csv")
    assert report.after.quality is not None
    assert report.after.quality.accuracy.n == len(rows)
    assert "one-label" in codes(report)
    assert "one-answer" not in codes(report)
