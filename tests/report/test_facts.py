from __future__ import annotations

import pytest

from kdcli.report import facts
from kdcli.report.facts import Fact
from tests.report.reports import bare, full, measurement


def test_visible_leaves_text_and_shows_the_rest() -> None:
    assert facts.visible("größe 漢字 😀") == "größe 漢字 😀"
    assert facts.visible("\x1b[0m\n\u202e\udcff\x9b") == r"\x1b[0m\n\u202e\udcff\x9b"


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (facts.size, 17631167, "16.8 MiB"),
        (facts.size, 12, "12 B"),
        (facts.size, None, "-"),
        (facts.count, 4405270, "4.405 M"),
        (facts.count, 0, "0"),
        (facts.number, 0.1824, "0.182"),
        (facts.number, 1430.15, "1,430"),
        (facts.number, 12.34, "12.3"),
        (facts.score, 0.8, "0.8000"),
        (facts.probability, 1e-168, "p < 0.0001"),
        (facts.probability, 0.034, "p = 0.034"),
    ],
)
def test_formats(function: object, value: float | None, expected: str) -> None:
    assert callable(function)
    assert function(value) == expected


@pytest.mark.parametrize(
    ("fact", "change", "better"),
    [
        (Fact("s", "bytes", 400, 100, True), "4.00x smaller", True),
        (Fact("s", "bytes", 100, 400, True), "4.00x larger", False),
        (Fact("s", "bytes", 100, 100, True), "same", None),
        (Fact("s", "bytes", 100, 0, True), "", None),
        (Fact("l", "ms", 100, 101, True), "same within 2 %", None),
        (Fact("l", "ms", 100, 130, True), "1.30x slower", False),
        (Fact("t", "rate", 100, 130, False), "1.30x more", True),
        (Fact("a", "score", 0.9, 0.8, False), "-0.1000, worse", False),
        (Fact("e", "score", 0.2, 0.1, True), "-0.1000, better", True),
        (Fact("a", "score", 0.9, 0.90001, False), "same", None),
        (Fact("a", "score", 0.9, 0.89, False, p_value=0.3), "-0.0100, within noise (p = 0.3)", None),
        (Fact("a", "score", 0.9, 0.89, False, p_value=0.01), "-0.0100, worse", False),
        (Fact("a", "score", None, 0.8, False), "", None),
    ],
)
def test_changes_are_words(fact: Fact, change: str, better: bool | None) -> None:
    assert (fact.change, fact.better) == (change, better)


def test_other_thread_counts_and_lengths_are_not_compared() -> None:
    before, after = measurement(), measurement()
    before.latency[0].threads = 4
    before.compute.sequence = 99
    report = bare().model_copy(update={"before": before, "after": after})
    rows = {fact.name: fact for fact in facts.comparison(report)}
    assert rows["latency p50, onnx, batch 1"].before is None
    assert rows["latency p50, onnx, batch 32"].before == 32
    assert rows["multiply-accumulates (10 tokens)"].before is None


def test_what_nobody_measured_has_no_row() -> None:
    assert facts.comparison(bare()) == []


def test_verdicts_in_words() -> None:
    assert facts.verdict_text(full()) == "FAILED: 2 of 3 gates missed"
    assert facts.verdict_text(bare()) == "done, no gates asked for"


def test_this_machines_directories_stay_here() -> None:
    paths = ["kdcli", "prune", "/home/ann/m", "--out=/home/ann/o", "~/x", r"C:\Users\ann\m", "out/student"]
    text = facts.command_text(full().model_copy(update={"command": paths}))
    assert text == "kdcli prune m --out=o x m out/student"
