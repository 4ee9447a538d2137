"""What CI systems read: JUnit XML and the job summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as etree

from kdcli.errors import UsageError
from kdcli.report import facts, markdown
from kdcli.report.schema import Report

SUMMARY_LIMIT = 1_000_000
"""GitHub drops a step summary above 1 MiB as a whole."""

_CUT = "\n*A further kdcli report is left out: this summary is full.*\n"


def junit(reports: Report | Sequence[Report]) -> str:
    """JUnit XML with one suite a report, one test case a gate and one for parity.

    Names and messages are on one line without control characters, and every message begins with a
    fixed word, so a runner that prints them can't be made to print a workflow command.
    """
    many = [reports] if isinstance(reports, Report) else list(reports)
    root = etree.Element("testsuites", name="kdcli")
    for report in many:
        cases = _cases(report)
        suite = etree.SubElement(
            root,
            "testsuite",
            name=f"kdcli {facts.visible(report.stage)} {facts.visible(facts.public(report.model.source))}",
            tests=str(len(cases)),
            failures=str(sum(message is not None for _, message in cases)),
            errors="0",
            time=f"{sum(report.timings.values()):.3f}",
            timestamp=facts.visible(report.created_at),
        )
        for name, message in cases:
            case = etree.SubElement(
                suite, "testcase", classname=f"kdcli.{facts.visible(report.stage)}", name=facts.visible(name)
            )
            if message is not None:
                failure = etree.SubElement(case, "failure", type="gate", message=facts.visible(message))
                failure.text = facts.visible(message)
    root.set("tests", str(sum(int(suite.get("tests", "0")) for suite in root)))
    root.set("failures", str(sum(int(suite.get("failures", "0")) for suite in root)))
    etree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + etree.tostring(root, encoding="unicode") + "\n"


def _cases(report: Report) -> list[tuple[str, str | None]]:
    """(name, what failed or None)."""
    cases: list[tuple[str, str | None]] = []
    for gate in report.gates:
        missed = f"missed {gate.expression}: {facts.gate_text(gate)}"
        cases.append((f"gate {gate.name}", None if gate.passed else missed))
    if report.parity is not None:
        text = f"the export {facts.parity_text(report)}"
        cases.append(("parity", None if report.parity.passed else text))
    return cases


def step_summary(path: Path, report: Report) -> None:
    """Append the report as Markdown, as long as the file stays below :data:`SUMMARY_LIMIT` bytes.

    Raises:
        UsageError: The file can't be written.
    """
    content = ("\n" + markdown.table(report)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            room = SUMMARY_LIMIT - stream.tell()
            if len(content) > room:
                content = _CUT.encode() if len(_CUT) <= room else b""
            stream.write(content)
    except OSError as error:
        raise UsageError(f"cannot write the summary '{path}': {error.strerror}") from error
