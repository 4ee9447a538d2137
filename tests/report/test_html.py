from __future__ import annotations

from html.parser import HTMLParser

import pytest

from kdcli.report.html import page
from kdcli.report.schema import Report
from tests.report.reports import bare, full, hostile

_VOID = {"meta", "rect", "line", "circle"}


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
