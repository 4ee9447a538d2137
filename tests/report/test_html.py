from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest

from kdcli.report import markdown
from kdcli.report.html import page
from kdcli.report.schema import Report
from tests.report.reports import bare, full, hostile

_VOID = {"meta", "rect", "line", "circle", "polyline"}


class _Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.seen = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.seen += data


@pytest.mark.parametrize("reports", [[full()], [bare()], [hostile()], [full(), bare(), hostile()]])
def test_a_page_is_whole_offline_and_without_scripts(reports: list[Report]) -> None:
    content = page(reports)
    found = _Page(content)
    assert not set(found.tags) & {"script", "link", "img", "iframe", "a", "object", "form", "base"}
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "srcset", "style"}
    assert not any(name.startswith("on") for name in names)
    assert "url(" not in content
    assert "@import" not in content
    assert "default-src 'none'" in content


def test_hostile_names_are_text() -> None:
    content = page(hostile())
    assert "<script" not in content
    for raw in ("\x1b", "\r", "\u202e"):
        assert raw not in content
    assert "<script>alert(1)</script>" in _Page(content).seen
    assert "\n::error" not in content


def test_everything_of_a_report_is_on_its_page() -> None:
    seen = _Page(page(full())).seen
    for expected in (
        "kdcli prune: out/student",
        "FAILED: 2 of 3 gates missed",
        "-0.1502, worse",
        "49.5x faster",
        "not measured",
        "agrees with the checkpoint",
        "heads_after",
        "org/teacher@0123abc",
        "Example CPU",
        "accuracy fell by",
        "cdcdcd",
        "fused",
        "--sparsity",
    ):
        assert expected in seen, expected
    # The measurement that the first lineage entry carries is not a setting.
    assert "throughput_per_s" not in seen


def test_bars_are_to_scale() -> None:
    report = full()
    assert report.before is not None
    before, after = report.before.size.onnx_bytes, report.after.size.onnx_bytes
    assert before is not None
    assert after is not None
    row = next(line for line in page(report).split("<tr>") if line.startswith("<td>model.onnx</td>"))
    widths = [
        float(value or 0) for name, value in _Page(f"<table><tr>{row}</table>").attributes if name == "width"
    ]
    assert widths == [160.0, 160.0, pytest.approx(160 * after / before, abs=0.05)]


def test_several_reports_are_compared() -> None:
    found = _Page(page([full(), full()]))
    assert "2 models compared" in found.seen
    assert found.tags.count("circle") == 2
    assert found.seen.count("FAILED: 2 of 3 gates missed") == 2
    assert "circle" not in _Page(page([full(), bare()])).tags


def test_no_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        page([])


def _sensitive() -> Report:
    rows = [
        {"layer": layer, "part": part, "removed": removed, "kl": kl * (layer + 1)}
        for layer in range(3)
        for part, kl in (("heads", 0.02), ("neurons", 0.001))
        for removed in (0.25, 0.5, 1.0)
    ]
    report = full()
    assert report.method is not None
    broken: list[object] = [{"layer": 9, "part": "heads"}, {**rows[0], "kl": "x"}, "<script>", None]
    detail = report.method.detail | {"sensitivity": [*rows, *broken]}
    return report.model_copy(update={"method": report.method.model_copy(update={"detail": detail})})


def test_sensitivity_is_a_chart_a_layer_and_a_table() -> None:
    content = page(_sensitive())
    found = _Page(content)
    assert "style" not in {name for name, _ in found.attributes}
    assert "script" not in found.tags
    labels = [value for name, value in found.attributes if name == "aria-label"]
    assert len(labels) == 3
    assert labels[2] == (
        "layer 2: heads 0.06 at 25 %, 0.06 at 50 %, 0.06 at 100 %; "
        "neurons 0.003 at 25 %, 0.003 at 50 %, 0.003 at 100 %"
    )
    assert content.count("<polyline") == 6
    assert "KL, nats" in found.seen
    assert "the heads of layer 2 (KL 0.06 nats with 50 % removed) changed the answers most" in found.seen
    assert "the neurons of layer 0 (KL 0.001 nats" in found.seen
    # 0.06 is 1.22 decades below 0.1, the top of the axis; nothing removed is at its foot.
    points = content.partition('class="trace heads"')[2].partition('points="')[2].partition('"')[0].split()
    assert points[0] == "4.0,94.0"
    first = 18 + 76 * (-1 - math.log10(0.02)) / 4
    assert [float(p.split(",")[1]) for p in points[1:]] == pytest.approx([first] * 3, abs=0.06)
    assert [float(p.split(",")[0]) for p in points[1:]] == pytest.approx([44.5, 85.0, 166.0], abs=0.06)


def test_a_report_without_sensitivity_has_no_chart_of_it() -> None:
    assert "Sensitivity" not in page(full())
    assert "polyline" not in page(hostile())


def test_tries_of_a_search_are_a_table() -> None:
    report = full()
    assert report.method is not None
    tries = [
        {"try": 1, "sparsity": 0.475, "accuracy": 0.93, "drop": 0.03, "kept": False},
        {"try": 2, "sparsity": 0.2375, "accuracy": 0.955, "drop": 0.005, "kept": True},
    ]
    detail = {"search": {"max_drop": 0.01, "tries": tries}}
    method = report.method.model_copy(update={"detail": detail, "params": {"sparsity": 0.2375}})
    seen = _Page(page(report.model_copy(update={"method": method}))).seen
    assert "How much was removed" in seen
    assert "23.8 % removed is the most of 2 tries that keeps a drop of 0.01 on the validation rows." in seen
    assert "0.475" in seen
    target = {"target": 1.6, "measured": 1.58, "tries": [{"try": 1, "predicted": 1.604, "measured": 1.58}]}
    method = report.method.model_copy(update={"detail": {"target_speedup": target}})
    said = markdown.table(report.model_copy(update={"method": method}))
    assert (
        "1.6 times faster at batch 1 was asked for: 1.60 predicted, 1.58 measured when it was cut, 1 try."
        in said
    )
