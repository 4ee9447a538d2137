from __future__ import annotations

import ast
import builtins
import re
from typing import Any

import pytest
import yaml

from kdcli.report import card as cards
from kdcli.report.facts import visible
from kdcli.report.schema import LineageEntry, Quality, Report
from kdcli.run import report_of
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.multi_label import MultiLabel
from kdcli.tasks.regression import Regression
from kdcli.tasks.task import Task
from tests.report.reports import HOSTILE, bare, full, hostile, multi_label, regression


def card(report: Report, task: Task = CLASSIFICATION, base_model: str | None = None) -> str:
    return cards.card(report, report_of.use_of(task), base_model)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def quantized(isa: list[str], scheme: str = "dynamic-int8") -> Report:
    report = full()
    entry = LineageEntry(
        stage="quantize",
        method=scheme,
        report_sha256=None,
        model="out/pruned",
        metric="accuracy",
        value=0.8,
        params={},
    )
    environment = report.environment.model_copy(update={"isa": isa})
    return report.model_copy(update={"lineage": [*report.lineage, entry], "environment": environment})


def test_front_matter_holds_only_what_was_measured() -> None:
    matter = front_matter(card(full()))
    assert matter["library_name"] == "transformers"
    assert matter["base_model"] == "org/teacher"
    assert matter["tags"] == ["kdcli", "onnx", "model-compression", "distill", "prune"]
    result = matter["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "data/intents", "type": "data/intents", "split": "test"}
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [
        ("accuracy", 0.805778),
        ("f1", 0.798818),
    ]
    assert set(front_matter(card(bare()))) == {"library_name", "pipeline_tag", "tags"}


def test_a_reference_that_may_be_a_directory_is_no_base_model() -> None:
    report = full()
    report.lineage[0].model = "out/teacher"
    assert "base_model" not in front_matter(card(report))
    assert front_matter(card(report, base_model="org/known"))["base_model"] == "org/known"


def test_the_text_has_history_numbers_and_limits() -> None:
    text = card(full())
    assert "# org/teacher\\@0123abc, distilled, pruned\n" in text
    assert "| distill | response | org/teacher\\@0123abc | 0.9560 | alpha=0.5 |" in text
    assert "| model.onnx | 86.9 MiB | 16.8 MiB | 5.17x smaller |" in text
    assert "4500 rows of the split test" in text
    assert "between 0.7940 and 0.8171" in text
    assert "agreement&gt;=0.99 MISSED" in text
    assert "On 18.13 % of the rows it answers differently" in text
    assert "Example CPU, 2 threads" in text
    assert "balance, transfer, greeting" in text
    assert "measurement" not in text


def test_zeros_are_not_called_smaller() -> None:
    report = full()
    assert "are zero" not in card(report)
    report.after.size.nonzero_parameters = (report.after.size.parameters or 0) // 2
    assert "50 % of the weights are zero. Zeros are not smaller" in card(report)


@pytest.mark.parametrize(
    ("isa", "said"),
    [
        (["avx2"], "does not list such instructions"),
        (["avx2", "avx512_vnni"], "has such instructions"),
        ([], "(VNNI). A"),
    ],
)
def test_int8_is_not_promised_to_be_fast(isa: list[str], said: str) -> None:
    text = card(quantized(isa))
    assert "Int8 may be slower than float32" in text
    assert said in text


def test_a_model_without_integers_hears_nothing_of_int8() -> None:
    assert "Int8" not in card(full())
    assert "Int8" not in card(quantized(["avx2"], scheme="fp16"))


@pytest.mark.parametrize(
    "task",
    [CLASSIFICATION, MultiLabel(), Regression(), Regression(activation="sigmoid")],
    ids=["text-classification", "multi-label", "regression", "sigmoid"],
)
def test_the_python_in_the_card_is_python_and_ends_in_the_tasks_own(task: Task) -> None:
    blocks = re.findall(r"```python\n(.*?)```", card(full(), task), re.DOTALL)
    assert len(blocks) == 2
    for block, of_graph in zip(blocks, (False, True), strict=True):
        nodes = list(ast.walk(ast.parse(block)))
        assert block.endswith(task.snippet(of_graph=of_graph) + "\n")
        given = {
            one.asname or one.name
            for n in nodes
            if isinstance(n, ast.Import | ast.ImportFrom)
            for one in n.names
        }
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in nodes if isinstance(n, ast.Name)}
        assert used <= given | stored | set(dir(builtins))
        assert given <= used


def test_the_card_of_several_labels() -> None:
    text = card(multi_label(), MultiLabel())
    matter = front_matter(text)
    assert matter["pipeline_tag"] == "text-classification"
    assert matter["metrics"] == ["f1", "accuracy"]
    result = matter["model-index"][0]["results"][0]
    assert [(one["type"], one["name"], one["value"]) for one in result["metrics"]] == [
        ("f1", "micro-F1", 0.5492),
        ("f1", "macro F1", 0.4397),
        ("accuracy", "subset accuracy", 0.408),
    ]
    assert "A bert model for multi-label with 3 labels" in text
    assert "| step | method | model it started from | micro-F1 after it | settings |" in text
    assert "The micro-F1 of 0.5492 is an estimate" in text
    assert "may lie between 0.5288 and 0.5696" in text
    assert "On 6.90 % of the rows it answers differently from the model before it; the micro-F1 alone" in text
    assert "always answers with one of them" not in text


def test_the_card_of_numbers() -> None:
    text = card(regression(), Regression())
    matter = front_matter(text)
    assert matter["metrics"] == ["spearmanr", "pearsonr"]
    assert "with 1 label," in text
    assert "3.80 % of the pairs of rows stand in another order than with the model before it" in text
    assert "The Spearman of 0.8630 is an estimate" in text
    assert "87.3" not in text
    assert "one of them" not in text


def test_a_metric_that_nobody_knows_cannot_break_the_front_matter() -> None:
    report = multi_label()
    assert report.after.quality is not None
    name = "x: [1]"
    odd = Quality.of(name, {name: report.after.quality.main})
    after = report.after.model_copy(update={"quality": odd})
    matter = front_matter(card(report.model_copy(update={"after": after})))
    assert matter["metrics"] == [name]


def test_hostile_names_are_harmless() -> None:
    text = card(hostile())
    matter = front_matter(text)
    assert matter["model-index"][0]["results"][0]["dataset"]["name"] == visible(HOSTILE)
    body = text.split("---\n", 2)[2]
    outside = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    for raw in ("<script", "::error", "[l](javascript"):
        assert raw not in outside
    for raw in ("\x1b", "\r", "\u202e"):
        assert raw not in text
    assert not re.search(r"^::", text, re.MULTILINE)
