from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as etree

import pytest

from kdcli.errors import UsageError
from kdcli.report import ci
from kdcli.report.facts import visible
from kdcli.report.markdown import table
from tests.report.reports import HOSTILE, bare, full, hostile, with_gates


def test_one_case_a_gate_and_one_for_parity() -> None:
    root = etree.fromstring(ci.junit(full()))
    cases = {case.get("name"): case.find("failure") for case in root.iter("testcase")}
    assert set(cases) == {"gate max-drop", "gate min-speedup", "gate agreement>=0.99", "parity"}
    assert cases["parity"] is None
    assert cases["gate max-drop"] is None
    failure = cases["gate min-speedup"]
    assert failure is not None
    assert failure.get("message") == "missed speedup>=100: 49.5"
    missing = cases["gate agreement>=0.99"]
    assert missing is not None
    assert missing.text == "missed agreement>=0.99: not measured"
    assert (root.get("tests"), root.get("failures")) == ("4", "2")


def test_a_failed_parity_is_a_failure() -> None:
    root = etree.fromstring(ci.junit(with_gates(bare(), parity=False)))
    failure = root.find(".//failure")
    assert failure is not None
    assert (failure.get("message") or "").startswith("the export DOES NOT AGREE with the checkpoint")


def test_several_reports_are_one_document() -> None:
    root = etree.fromstring(ci.junit([full(), bare(), full()]))
    assert [suite.get("tests") for suite in root] == ["4", "0", "4"]
    assert (root.get("tests"), root.get("failures")) == ("8", "4")


def test_hostile_names_stay_attributes() -> None:
    text = ci.junit(hostile())
    root = etree.fromstring(text)
    assert {child.tag for child in root.iter()} == {"testsuites", "testsuite", "testcase", "failure"}
    case = next(root.iter("testcase"))
    assert case.get("name") == visible(f"gate {HOSTILE}")
    assert "\x1b" not in text
    for element in root.iter():
        for value in (*element.attrib.values(), (element.text or "").strip()):
            assert not value.startswith("::")
            assert "\n" not in value


def test_a_summary_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.md"
    ci.step_summary(path, full())
    ci.step_summary(path, bare())
    assert path.read_text(encoding="utf-8") == "\n" + table(full()) + "\n" + table(bare())


def test_a_summary_never_reaches_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    start = ci.SUMMARY_LIMIT - 200
    path.write_bytes(b"x" * start)
    for _ in range(20):
        ci.step_summary(path, full())
    content = path.read_bytes()
    assert start < len(content) <= ci.SUMMARY_LIMIT
    assert b"this summary is full" in content[start:]
    assert b"###" not in content[start:]


def test_a_summary_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the summary"):
        ci.step_summary(tmp_path, full())
