"""Reports of tasks that are not judged by accuracy, in every form; and the table of metrics behind all of them."""

from __future__ import annotations

import doctest
from xml.etree import ElementTree as etree

import pytest

from kdcli.cli import table
from kdcli.cli.console import Console
from kdcli.errors import UsageError
from kdcli.report import ci, findings, gates, html, io, markdown, metrics
from kdcli.report.schema import Delta, Method, Quality, Report
from kdcli.request import Gates
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.multi_label import MultiLabel
from kdcli.tasks.regression import Regression
from kdcli.tasks.task import Task
from tests.report.reports import delta, full, measurement, multi_label, regression

TASKS = [CLASSIFICATION, MultiLabel(), Regression()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_metric_of_a_task_has_a_title_and_no_name_of_its_own_meaning(task: Task) -> None:
    assert set(task.metrics) <= set(metrics.KNOWN)
    assert task.primary in task.metrics
    taken = {*Quality.model_fields, *Delta.model_fields, *gates.GENERAL, "drop"}
    assert not taken & set(task.metrics)


def test_examples() -> None:
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize("report", [multi_label(), regression()], ids=lambda report: report.model.task)
def test_what_is_written_is_read_back(report: Report) -> None:
    assert Report.model_validate_json(io.dumps(report)) == report


def test_several_labels_as_markdown() -> None:
    text = markdown.table(multi_label())
    lines = text.splitlines()
    assert lines[6] == "| micro-F1 | 0.5521 ± 0.0101 | 0.5492 ± 0.0102 | -0.0029, within noise (p = 0.17) |"
    assert "| micro_f1&gt;=0.55 | micro_f1&gt;=0.55 | 0.5492 | **MISSED** |" in lines
    assert "Same answer as before on 93.10 % of rows; paired test p = 0.17; " in text
    assert "95 % interval of the change in micro-F1 -0.0071 to +0.0012" in text
    assert "McNemar" not in text


def test_numbers_as_markdown() -> None:
    text = markdown.table(regression())
    assert "| Spearman | 0.8730 ± 0.0071 | 0.8630 ± 0.0075 | -0.0100, worse |" in text
    assert "| RMSE | 12.51 | 13.02 | +0.51, worse |" in text  # lower is better
    assert "96.20 % of the pairs of rows in the same order as before" in text
    assert "rows lost" not in text


def test_an_interval_with_zero_in_it_is_noise_without_a_p_value() -> None:
    report = regression()
    report.delta.ci95 = (-0.02, 0.001)
    assert "-0.0100, within noise (95 % interval -0.0200 to +0.0010)" in markdown.table(report)


def test_other_tasks_as_a_page_and_as_junit() -> None:
    page = html.page(regression())
    assert "Spearman after it" in page
    assert "0.8630 ± 0.0075" in page
    assert "regression, 1 label;" in page
    chart = html.page([regression(), regression()])
    assert "Spearman over p50 at batch 1" in chart
    failure = etree.fromstring(ci.junit(multi_label())).find(".//failure")
    assert failure is not None
    assert failure.get("message") == "missed micro_f1>=0.55: 0.5492"


def test_other_tasks_on_the_console() -> None:
    lines = table.of_report(regression(), Console())
    assert [line.split()[0] for line in lines[2:5]] == ["Spearman", "Pearson", "RMSE"]
    assert "gate met: spearman>=0.86 (is 0.863)" in lines
    lines = table.of_several([regression(), regression()], Console())
    assert lines[1].split()[:2] == ["model", "Spearman"]
    assert "* no other model here is better in Spearman, size and latency" in lines


def test_minor_metrics_are_shown_with_v_or_as_the_primary_one() -> None:
    def shown(report: Report, **console: bool) -> bool:
        return any(line.startswith("calibration") for line in table.of_report(report, Console(**console)))

    assert not shown(full())
    assert shown(full(), verbose=True)
    report = full()
    for side in (report.before, report.after):
        assert side is not None
        assert side.quality is not None
        side.quality.primary = "ece"
    assert shown(report)


def test_models_with_other_primary_metrics_are_not_ranked() -> None:
    rows = [markdown.Row.of(multi_label()), markdown.Row.of(regression())]
    cells = markdown.cells(rows)
    assert [cell[1] for cell in cells] == ["micro-F1 0.5492 ± 0.0102", "Spearman 0.8630 ± 0.0075"]
    assert [cell[-1] for cell in cells] == ["", ""]
    assert "none is marked" in markdown.compare_table(rows)
    assert "<circle" not in html.page([multi_label(), regression()])


def test_where_lower_is_better_the_lowest_is_the_best() -> None:
    reports = [regression(), regression()]
    for report, rmse in zip(reports, (12.0, 13.0), strict=True):
        assert report.after.quality is not None
        report.after.quality.primary = "rmse"
        report.after.quality.main.value = rmse
    assert [cell[1] for cell in markdown.cells([markdown.Row.of(one) for one in reports])] == ["12", "13"]
    assert [cell[-1] for cell in markdown.cells([markdown.Row.of(one) for one in reports])] == ["*", ""]


def test_gates_on_the_metrics_of_the_task() -> None:
    report = regression()
    asked = Gates(max_drop=0.01, expressions=("spearman>=0.87", "rmse<=13.1", "drop<=0.005"))
    judged = gates.judge(asked, report.before, report.after, report.delta)
    assert [(one.value, one.passed) for one in judged] == [
        (0.01, True),
        (0.863, False),
        (13.02, True),
        (0.01, False),
    ]


def test_a_rise_is_the_drop_where_lower_is_better() -> None:
    report = regression()
    assert report.after.quality is not None
    report.after.quality.primary = report.delta.primary = "rmse"
    (gate,) = gates.judge(Gates(max_drop=0.5), report.before, report.after, report.delta)
    assert gate.value == pytest.approx(0.51)
    assert not gate.passed
    (gate,) = gates.judge(
        Gates(max_drop=0.5),
        report.before,
        report.after,
        Delta.model_validate({"primary": "rmse", "rmse": -2}),
    )
    assert gate.value == -2
    assert gate.passed


def test_a_gate_on_a_metric_of_another_task_is_refused_with_the_names_of_this_one() -> None:
    asked = Gates(expressions=("micro_f1>=0.6",))
    gates.check(asked, MultiLabel().metrics)
    with pytest.raises(UsageError, match="not a metric of this model") as caught:
        gates.judge(asked, None, measurement(), delta())
    assert caught.value.hint is not None
    assert "accuracy, macro_f1, ece" in caught.value.hint
    with pytest.raises(UsageError, match="it needs rows with a 'query'"):
        gates.check(Gates(expressions=("ndcg_at_10>=0.5",)), ("spearman",))
    gates.judge(asked, None, measurement(None), delta())  # nothing measured: missed, not refused


@pytest.mark.parametrize("given", ["spearman>=87", "r2<=1.5", "micro_f1>=60"])
def test_a_bounded_metric_in_percent_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="is at most 1"):
        gates.parse_expression(given)
    assert gates.parse_expression("rmse<=60").threshold == 60


def test_a_control_by_another_metric_is_told_in_its_unit() -> None:
    found = {"metric": "spearman", "student_spearman": 0.87, "split": "test"}
    found["runs"] = [{"name": "labels", "spearman": 0.85, "p_value": 0.01}]
    assert findings.control_words(found) == (
        "Spearman on test: 0.8700 distilled; without the teacher 0.8500 with the labels alone; "
        "the teacher gives +0.02 over that (p = 0.01)"
    )


def test_a_divergence_of_numbers_is_no_kl_in_nats() -> None:
    rows = [{"layer": n, "part": "heads", "removed": 0.5, "kl": 0.03 * n} for n in (1, 2)]
    report, other = full(), regression()
    for one in (report, other):
        one.method = Method(name="sensitivity", params={}, detail={"sensitivity": rows}, layers=[])
    assert "the heads of layer 2 (KL 0.06 nats with" in findings.sensitivity_text(report)
    assert "the heads of layer 2 (divergence 0.06 with 50 % removed)" in findings.sensitivity_text(other)
    page = html.page(other)
    assert "KL" not in page[page.index(">Sensitivity<") :].partition("</table>")[0]
