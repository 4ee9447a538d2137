from __future__ import annotations

import doctest
import re

import pytest

from kdcli.report import facts, markdown
from kdcli.report.markdown import Row, compare_table, escape, fenced, pareto, table
from tests.report.reports import HOSTILE, bare, full, hostile


@pytest.mark.parametrize("module", [markdown, facts], ids=lambda module: module.__name__)
def test_examples(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


def test_a_table_says_before_after_and_change() -> None:
    text = table(full())
    assert "| accuracy | 0.9560 ± 0.0031 | 0.8058 ± 0.0059 | -0.1502, worse |" in text
    assert "| model.onnx | 86.9 MiB | 16.8 MiB | 5.17x smaller |" in text
    assert "| latency p50, onnx, batch 1 | 9.04 ms | 0.182 ms | 49.5x faster |" in text
    assert "| min-speedup | speedup&gt;=100 | 49.5 | **MISSED** |" in text
    assert "| agreement&gt;=0.99 | agreement&gt;=0.99 | not measured | **MISSED** |" in text
    assert "agrees with the checkpoint" in text
    assert "\nSame answer as before on 81.87 % of rows; McNemar p &lt; 0.0001." in text


def test_a_bare_report_is_short() -> None:
    assert (
        table(bare())
        == "### kdcli evaluate: out/student\n\n**done, no gates asked for**\n\n|  | measured |\n| :-- | --: |\n"
    )


def test_hostile_names_stay_in_their_cells() -> None:
    text = table(hostile())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    # Cells are cut at bars without a backslash before them.
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert not re.search(r"(?<!\\):\\?:", text.replace("| :--", ""))
    for raw in ("<script", "\x1b", "\r", "\u202e", "::error", "&amp; `c`"):
        assert raw not in text
    assert not any(line.startswith(("# ", "::")) for line in text.splitlines())


@pytest.mark.parametrize("text", ["plain", "snake_case", "a-b.c", "größe"])
def test_plain_names_stay_readable(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize(
    "mark", ["*a*", "_a_", "[a](b)", "`a`", "~~a~~", "![a](b)", "$a$", "https://x", "@ann", "a|b"]
)
def test_marks_are_escaped(mark: str) -> None:
    assert escape(mark) != mark
    assert re.sub(r"\\(.)", r"\1", escape(mark)) == mark


def test_a_code_block_cannot_be_closed_from_inside() -> None:
    lines = fenced("a\n````\nb").splitlines()
    assert lines[0] == lines[-1] == "`````"


def test_pareto_by_hand() -> None:
    points = [
        (0.9, 100, 10),  # best accuracy
        (0.8, 50, 5),  # smaller and faster
        (0.8, 60, 5),  # beaten by the one above
        (0.8, 50, 5),  # a twin beats nobody
        (None, 1, 1),  # not judged
        (0.7, 200, 20),  # beaten by all
    ]
    assert pareto(points) == [True, True, False, True, False, False]
    assert pareto([]) == []


def test_rows_of_several_models() -> None:
    text = compare_table([Row.of(full()), Row.of(bare())])
    first, second = text.splitlines()[2:4]
    assert first == r"| out/student | 0.8058 ± 0.0059 | 16.8 MiB | 0.182 ms | 4.423 M | FAILED | \* |"
    assert second == "| out/student | - | - | - | - | ok |  |"


def test_rows_escape_names() -> None:
    text = compare_table([Row.of(hostile())])
    assert HOSTILE not in text
    assert "<script" not in text
    assert len(re.split(r"(?<!\\)\|", text.splitlines()[2])) == 9
