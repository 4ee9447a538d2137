"""The table after a run: before, after, and in words what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcli.cli.console import Console, clean

if TYPE_CHECKING:
    from kdcli.report.schema import Report


ZEROS = ("non-zero", "model.onnx, gzipped")
DETAILS = (*ZEROS, "throughput")
"""Beginnings of the rows that only -v shows, with the minor metrics; those of ZEROS always where many weights are
zero."""


def of_report(report: Report, console: Console) -> list[str]:
    """Before and after of one stage, then its answers, gates and warnings."""
    from kdcli.report import facts, findings

    zeros = facts.zero_share(report.after) > facts.MANY_ZEROS
    found = [
        fact
        for fact in facts.comparison(report)
        if console.verbose
        or not (fact.minor or fact.name.startswith(DETAILS))
        or (zeros and fact.name.startswith(ZEROS))
    ]
    if report.before is None:
        body = aligned([("", "measured"), *((fact.name, fact.texts[1]) for fact in found)])
        lines = ["", *body, ""]
    else:
        changes = [fact.change for fact in found]
        rows = [(fact.name, *fact.texts, change) for fact, change in zip(found, changes, strict=True)]
        body = aligned([("", "before", "after", "change"), *rows])
        colours = {True: "32", False: "31", None: ""}
        lines = ["", body[0]]
        for fact, change, line in zip(found, changes, body[1:], strict=True):
            code = colours[fact.better]
            lines.append(line.removesuffix(change) + console.paint(code, change) if code and change else line)
        lines.append("")
    if said := facts.delta_text(report):
        lines.append(said)
    if report.stage == "evaluate" and (said := facts.files_text(report)):
        lines.append(clean(said))
    lines += [clean(said) for said in (findings.amount_text(report), findings.control_text(report)) if said]
    return lines + _notes([report], console)


def of_several(reports: Sequence[Report], console: Console) -> list[str]:
    """One row a model; a star marks those that no other one beats in the primary metric, size and latency."""
    from kdcli.report import markdown

    rows = [markdown.Row.of(report) for report in reports]
    table = aligned([markdown.columns(rows), *markdown.cells(rows)])
    lines = ["", *(clean(line) for line in table), ""]
    return [
        *lines,
        clean(markdown.legend(rows)),
        *_notes(reports, console),
    ]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Columns of equal width; the first ``left`` and the last are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i < left or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _notes(reports: Sequence[Report], console: Console) -> list[str]:
    """Gates and warnings; of several models each line names its own."""
    from kdcli.report import facts

    lines = []
    for report in reports:
        where = f"{clean(report.model.source)}: " if len(reports) > 1 else ""
        for gate in report.gates:
            verdict = console.paint("32", "met") if gate.passed else console.paint("31", "MISSED")
            value = clean(facts.gate_text(gate))
            lines.append(f"gate {verdict}: {where}{clean(gate.expression)} (is {value})")
        for warning in report.warnings:
            loud = warning.code in facts.ALARMS
            word = console.paint("31", "WARNING") if loud else console.paint("33", "warning")
            lines.append(f"{word}: {where}{clean(warning.message)}")
    return lines
