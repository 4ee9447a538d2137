"""Reports as GitHub Markdown: for job summaries, pull requests and model cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdcli.report import facts, findings, metrics
from kdcli.report.schema import MetricValue, Report

_SPECIAL = re.compile(r"[\\`*\[\]#|~!$]|(?<!\w)_|_(?!\w)|:(?=[:/])|(?<=:):|@(?=\w)")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too.

    >>> escape("a|b <img> ::error")
    'a\\\\|b &lt;img&gt; \\\\:\\\\:error'
    """
    return _SPECIAL.sub(lambda found: "\\" + found[0], facts.visible(text)).translate(_ENTITIES)


def fenced(text: str, language: str = "") -> str:
    """A code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table; the cells are escaped already, ``right`` are the columns with numbers."""
    numbers = set(right)
    rule = ["--:" if i in numbers else ":--" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def numbers(report: Report) -> str:
    """Before, after and the change in words."""
    rows = []
    for fact in facts.comparison(report):
        before, after = fact.texts
        rows.append((fact.name, before, after, fact.change))
    if report.before is None:
        return grid(("", "measured"), [(escape(name), after) for name, _, after, _ in rows], right=(1,))
    return grid(
        ("", "before", "after", "change"), [(escape(name), *rest) for name, *rest in rows], right=(1, 2)
    )


def table(report: Report) -> str:
    """One report: numbers, gates, parity, warnings. Ends with a newline."""
    parts = [
        f"### kdcli {escape(report.stage)}: {escape(facts.public(report.model.source))}",
        f"**{escape(facts.verdict_text(report))}**",
        numbers(report),
    ]
    if said := facts.delta_text(report):
        parts.append(escape(said[0].upper() + said[1:] + "."))
    parts += [
        escape(said[0].upper() + said[1:] + ".")
        for said in (facts.files_text(report), *found_out(report))
        if said
    ]
    if report.gates:
        parts.append(
            grid(
                ("gate", "condition", "measured", "result"),
                [
                    (
                        escape(gate.name),
                        escape(gate.expression),
                        escape(facts.gate_text(gate)),
                        "met" if gate.passed else "**MISSED**",
                    )
                    for gate in report.gates
                ],
                right=(2,),
            )
        )
    if said := facts.parity_text(report):
        parts.append(escape(f"The ONNX export {said}."))
    if report.warnings:
        parts.append(warnings(report))
    return "\n\n".join(parts) + "\n"


def found_out(report: Report) -> list[str]:
    """What a stage found out about the model on its way, in sentences without a full stop."""
    told = (findings.amount_text(report), findings.sensitivity_text(report), findings.control_text(report))
    return [said for said in told if said]


def warnings(report: Report) -> str:
    """One list item a warning."""
    return "\n".join(f"- {escape(one.code)}: {escape(one.message)}" for one in report.warnings)


@dataclass(frozen=True)
class Row:
    """One model in a table of several."""

    name: str
    metric: str | None  # the primary one; None where no quality was measured
    quality: MetricValue | None  # its value
    onnx_bytes: int | None
    p50_ms: float | None  # batch 1
    macs: int | None
    passed: bool

    @classmethod
    def of(cls, report: Report) -> Row:
        """The row of a report's ``after``."""
        after = report.after
        return cls(
            name=facts.public(report.model.source),
            metric=None if after.quality is None else after.quality.primary,
            quality=None if after.quality is None else after.quality.main,
            onnx_bytes=after.size.onnx_bytes,
            p50_ms=next((one.p50_ms for one in after.latency if one.batch == 1), None),
            macs=after.compute.macs,
            passed=report.verdict == 0,
        )

    @property
    def point(self) -> tuple[float | None, float | None, float | None]:
        """What :func:`pareto` compares: the primary metric, turned so that higher is better, bytes, milliseconds."""
        worth = None
        if self.quality is not None:
            worth = self.quality.value if self.quality.higher_is_better else -self.quality.value
        return worth, self.onnx_bytes, self.p50_ms


def metric_of(rows: Sequence[Row]) -> str | None:
    """The primary metric of all models; None where they have several, which are no comparison."""
    names = {row.metric for row in rows if row.metric is not None}
    return names.pop() if len(names) == 1 else None


def title_of(rows: Sequence[Row]) -> str:
    """What the metric of :func:`metric_of` is called; ``quality`` where there is none."""
    name = metric_of(rows)
    return "quality" if name is None else metrics.of(name).title


def pareto(points: Sequence[Sequence[float | None]]) -> list[bool]:
    """Which points no other point beats.

    Args:
        points: Each (higher is better, lower is better, lower is better, ...), such as (accuracy,
            bytes, milliseconds).

    Returns:
        True where no other point is at least as good everywhere and better somewhere. A point with
        a missing coordinate can't be judged: it is neither marked nor does it beat another.
    """
    known = [None if None in point else (-point[0], *point[1:]) for point in points]  # type: ignore[operator]
    marks = []
    for one in known:
        beaten = one is not None and any(
            other is not None and other != one and all(a <= b for a, b in zip(other, one, strict=True))  # type: ignore[operator]
            for other in known
        )
        marks.append(one is not None and not beaten)
    return marks


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Heads of :func:`cells`."""
    return ("model", title_of(rows), "model.onnx", "p50, batch 1", "MACs", "gates", "Pareto")


def best_of(rows: Sequence[Row]) -> list[bool]:
    """Which rows :func:`pareto` marks; none where the models have several primary metrics."""
    if metric_of(rows) is None:
        return [False] * len(rows)
    return pareto([row.point for row in rows])


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The texts below :func:`columns`, not escaped."""
    alike = metric_of(rows) is not None
    return [
        (
            row.name,
            _quality(row, named=not alike),
            facts.size(row.onnx_bytes),
            "-" if row.p50_ms is None else f"{facts.number(row.p50_ms)} ms",
            facts.count(row.macs),
            "ok" if row.passed else "FAILED",
            "*" if best else "",
        )
        for row, best in zip(rows, best_of(rows), strict=True)
    ]


def _quality(row: Row, *, named: bool) -> str:
    if row.metric is None:
        return "-"
    shown = facts.value_text(row.metric, row.quality)
    return f"{metrics.of(row.metric).title} {shown}" if named else shown


def legend(rows: Sequence[Row]) -> str:
    """What the star in the last column means."""
    several = len({row.metric for row in rows if row.metric is not None}) > 1
    if several:
        return "the models are judged by different metrics, so none is marked"
    return f"* no other model here is better in {title_of(rows)}, size and latency"


def compare_table(rows: Sequence[Row]) -> str:
    """Several models; a star marks those that no other one beats in the primary metric, size and latency."""
    body = [tuple(escape(cell) for cell in line) for line in cells(rows)]
    head = [escape(one) for one in columns(rows)]
    return f"{grid(head, body, right=(1, 2, 3, 4))}\n\n{escape(legend(rows))}\n"
