"""Reports as one HTML page: offline, without scripts, everything escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape as _escape
from typing import Any

from kdcli.report import facts, findings, markdown, metrics
from kdcli.report.markdown import Row
from kdcli.report.schema import Measurement, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #fff;
  --old: #9aa5b1; --new: #2563a8; --good: #1a7f37; --bad: #b42318; --wash: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #3a424b; --page: #14181c;
    --old: #6b7682; --new: #6aa9e9; --good: #4cc26a; --bad: #ff8a7a; --wash: #1d2329 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h1, td, th, li, p { overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% } .wide { overflow-x: auto }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line) }
th, td { vertical-align: top } th { color: var(--soft); font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal }
.soft { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) }
.verdict { font-weight: 600 } code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { background: var(--wash); padding: .7rem; overflow-x: auto; white-space: pre-wrap }
svg { display: block; max-width: 100% } .axis { stroke: var(--line) }
.old { fill: var(--old) } .new { fill: var(--new) }
.charts { display: flex; flex-wrap: wrap; gap: .8rem }
.trace { fill: none; stroke-width: 2 } .heads { stroke: var(--new) } .neurons { stroke: var(--bad) }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .4rem }
""".strip()
# Should an escape ever be missing, the browser still runs and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_WIDTH = 160  # of a bar, in pixels


def page(reports: Report | Sequence[Report]) -> str:
    """One self-contained page of one report, or of several with a table and a chart of all.

    Raises:
        ValueError: There is no report.
    """
    many = [reports] if isinstance(reports, Report) else list(reports)
    if not many:
        raise ValueError("a page needs at least one report")
    if len(many) == 1:
        title = f"kdcli {many[0].stage}: {facts.public(many[0].model.source)}"
        body = _one(many[0], title)
    else:
        title = f"kdcli: {len(many)} models compared"
        body = _several(many, title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Any value as text that is neither markup nor a control character."""
    return _escape(facts.visible(str(value)), quote=True)


def _one(report: Report, title: str, level: str = "h1") -> str:
    tone = "good" if report.verdict == 0 and facts.alarm(report) is None else "bad"
    parts = [
        f"<{level}>{text(title)}</{level}>",
        f'<p class="verdict {tone}">{text(facts.verdict_text(report))}</p>',
        f'<p class="soft">{text(_byline(report))}</p>',
        f'<p class="soft">{text(facts.files_text(report))}</p>' if report.after.files else "",
        _section("Before and after" if report.before else "Numbers", _numbers(report)),
        _section("Gates", _gates(report)),
        _section("ONNX export", f"<p>{text(facts.parity_text(report))}</p>" if report.parity else ""),
        _section("Warnings", _list(f"{one.code}: {one.message}" for one in report.warnings)),
        _section("Latency", _latency(report)),
        _section("Layers", _records(report.method.layers if report.method else [])),
        _section("Sensitivity", _sensitivity(report)),
        _section("How much was removed", _amount(report)),
        _section("Without the teacher", _control(report)),
        _section("Lineage", _lineage(report)),
        _section("Method", _method(report)),
        _section("Environment", _environment(report)),
        _details("Options", _options(report)),
        _details("Seconds a phase", _pairs({k: f"{v:.2f}" for k, v in report.timings.items()})),
        _details("Files", _files(report)),
    ]
    return "\n".join(part for part in parts if part)


def _byline(report: Report) -> str:
    model = report.model
    said = [f"{model.family}, {model.task}, {facts.labels_text(report)}"]
    if report.data is not None:
        rows = ", ".join(f"{split} {count}" for split, count in report.data.rows.items())
        said.append(f"data {facts.public(report.data.ref)} ({rows})")
    said.append(f"kdcli {report.kdcli_version}, {report.created_at}")
    if not report.complete:
        said.append("INCOMPLETE")
    return "; ".join(said)


def _numbers(report: Report) -> str:
    rows = []
    for fact in facts.comparison(report):
        before, after = fact.texts
        tone = {True: "good", False: "bad", None: "soft"}[fact.better]
        if report.before is None:
            rows.append(f'<tr><td>{text(fact.name)}</td><td class="n">{text(after)}</td></tr>')
            continue
        rows.append(
            f'<tr><td>{text(fact.name)}</td><td class="n">{text(before)}</td><td class="n">{text(after)}</td>'
            f'<td class="{tone}">{text(fact.change)}</td><td>{_bars(fact)}</td></tr>'
        )
    if report.before is None:
        head = '<th></th><th class="n">measured</th>'
    else:
        head = (
            '<th></th><th class="n">before</th><th class="n">after</th><th>change</th>'
            "<th>grey before, blue after</th>"
        )
    said = facts.delta_text(report)
    below = f"<p>{text(said[0].upper() + said[1:])}.</p>" if said else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{below}'


def _bars(fact: facts.Fact) -> str:
    """Two bars on one scale from 0; the numbers stand beside them, so they are hidden from screen readers."""
    top = 1.0 if fact.kind == "score" else max(fact.before or 0.0, fact.after or 0.0, 0.0)
    bars = []
    for y, tone, value in ((1, "old", fact.before), (11, "new", fact.after)):
        if value is not None and top > 0:
            width = max(1.0, _WIDTH * min(value / top, 1.0)) if value > 0 else 0.0
            bars.append(f'<rect class="{tone}" x="0" y="{y}" width="{width:.1f}" height="8"/>')
    frame = f'width="{_WIDTH}" height="20" viewBox="0 0 {_WIDTH} 20"'
    return f'<svg {frame} aria-hidden="true">{"".join(bars)}</svg>'


def _gates(report: Report) -> str:
    rows = []
    for gate in report.gates:
        tone, word = ("good", "met") if gate.passed else ("bad", "MISSED")
        measured = facts.gate_text(gate)
        rows.append(
            f"<tr><td>{text(gate.name)}</td><td><code>{text(gate.expression)}</code></td>"
            f'<td class="n">{text(measured)}</td><td class="{tone}">{word}</td></tr>'
        )
    head = '<th>gate</th><th>condition</th><th class="n">measured</th><th>result</th>'
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""


def _latency(report: Report) -> str:
    sides: list[tuple[str, Measurement | None]] = [("before", report.before), ("after", report.after)]
    rows = [
        {
            "model": side,
            "runtime": one.runtime,
            "batch": one.batch,
            "tokens a row": one.sequence,
            "threads": one.threads,
            "p50 ms": one.p50_ms,
            "p90 ms": one.p90_ms,
            "p99 ms": one.p99_ms,
            "rows a second": one.throughput_per_s,
            "batches": one.n,
        }
        for side, measurement in sides
        if measurement is not None
        for one in measurement.latency
    ]
    return _records(rows)


def _amount(report: Report) -> str:
    rows = findings.tries(report)
    said = findings.amount_text(report)
    return (f"<p>{text(said[0].upper() + said[1:])}.</p>" if said else "") + (_records(rows) if rows else "")


def _control(report: Report) -> str:
    said = findings.control_text(report)
    return f"<p>{text(said[0].upper() + said[1:])}.</p>" if said else ""


_CHART = (170, 110)  # of one layer's sensitivity, in pixels
_DECADES = 4  # of a nat, below the largest value: what is smaller lies on the axis


def _sensitivity(report: Report) -> str:
    """One small chart a layer, all on one logarithmic scale; the same numbers follow as a table."""
    rows = findings.sensitivity(report)
    top = max((row.kl for row in rows), default=0.0)
    if top <= 0:
        return ""
    high = math.ceil(math.log10(top))
    charts = []
    for layer in dict.fromkeys(row.layer for row in rows):
        own = [row for row in rows if row.layer == layer]
        charts.append(_layer_chart(layer, own, high))
    said = findings.sensitivity_text(report)
    nats = findings.in_nats(report)
    what = "KL divergence" if nats else "Divergence (half the squared difference)"
    legend = (
        f"{what} from the dense model's answers{', in nats,' if nats else ''} over the share removed from one "
        "sub-layer alone: heads solid, neurons dashed. "
        f"Every axis goes from 1e{high - _DECADES} to 1e{high}, each line a tenth."
    )
    column = "KL, nats" if nats else "divergence"
    table = _records([{"layer": r.layer, "part": r.part, "removed": r.removed, column: r.kl} for r in rows])
    return (
        (f"<p>{text(said[0].upper() + said[1:])}.</p>" if said else "")
        + f'<p class="soft">{text(legend)}</p><div class="charts">{"".join(charts)}</div>'
        + _details("The same in numbers", table)
    )


def _layer_chart(layer: int, rows: Sequence[findings.Sensitivity], high: int) -> str:
    width, height = _CHART
    left, right, upper, lower = 4, width - 4, 18, height - 16

    def at(removed: float, kl: float) -> str:
        decades = high - math.log10(kl) if kl > 0 else float(_DECADES)
        y = upper + (lower - upper) * min(max(decades, 0.0), _DECADES) / _DECADES
        return f"{left + (right - left) * removed:.1f},{y:.1f}"

    lines, said = [], []
    for decade in range(_DECADES + 1):
        y = upper + (lower - upper) * decade / _DECADES
        lines.append(f'<line class="axis" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
    for part, dashes in (("heads", ""), ("neurons", ' stroke-dasharray="5 3"')):
        own = [row for row in rows if row.part == part]
        if own:
            points = " ".join([at(0.0, 0.0), *(at(row.removed, row.kl) for row in own)])
            lines.append(f'<polyline class="trace {part}"{dashes} points="{points}"/>')
            values = ", ".join(f"{facts.number(row.kl)} at {100 * row.removed:.0f} %" for row in own)
            said.append(f"{part} {values}")
    label = f"layer {layer}: {'; '.join(said)}"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(label)}">'
        f'<text x="{left}" y="12">layer {layer}</text>{"".join(lines)}'
        f'<text x="{left}" y="{height - 2}">0 %</text>'
        f'<text x="{right}" y="{height - 2}" text-anchor="end">100 %</text></svg>'
    )


def _lineage(report: Report) -> str:
    head, values = facts.values_after(report.lineage)
    rows = [
        {
            "step": entry.stage,
            "method": entry.method,
            "model it started from": facts.public(entry.model),
            head: value,
            "settings": facts.parameters_of(entry),
            "report sha256": (entry.report_sha256 or "")[:12],
        }
        for entry, value in zip(report.lineage, values, strict=True)
    ]
    return _records(rows)


def _method(report: Report) -> str:
    if report.method is None:
        return ""
    drawn = {"sensitivity"} if findings.sensitivity(report) else set()
    shown = {key: value for key, value in report.method.detail.items() if key not in drawn}
    detail = _details("Detail", f"<pre>{_json(shown)}</pre>") if shown else ""
    return f"<p>{text(report.method.name)}</p>{_pairs(report.method.params)}{detail}"


def _environment(report: Report) -> str:
    where = report.environment
    shown: dict[str, Any] = {
        "CPU": f"{where.cpu}, {where.cores} cores, {where.threads} threads",
        "instructions": ", ".join(where.isa),
        "memory": facts.size(where.ram_bytes),
        "device": where.device if where.gpu is None else f"{where.device} ({where.gpu})",
        "platform": where.platform,
        "Python": where.python,
        "versions": ", ".join(f"{name} {version}" for name, version in where.versions.items()),
        "seed": f"{where.seed}{', deterministic' if where.deterministic else ''}",
    }
    return _pairs(shown)


def _options(report: Report) -> str:
    rows = [{"option": name, "value": one.value, "from": one.origin} for name, one in report.config.items()]
    command = f"<pre>{text(facts.command_text(report))}</pre>" if report.command else ""
    return command + _records(rows)


def _files(report: Report) -> str:
    return _records(
        [{"file": one.path, "size": facts.size(one.bytes), "sha256": one.sha256} for one in report.artifacts]
    )


def _several(reports: Sequence[Report], title: str) -> str:
    rows = [Row.of(report) for report in reports]
    head = "".join(f"<th>{text(name)}</th>" for name in ("", *markdown.columns(rows)))
    lines = "".join(
        f"<tr><td>{number}</td>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"
        for number, cells in enumerate(markdown.cells(rows), 1)
    )
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>',
        f'<p class="soft">{text(markdown.legend(rows))}</p>',
        _chart(rows),
    ]
    for number, report in enumerate(reports, 1):
        name = f"{number}. {facts.public(report.model.source)}"
        parts.append(f"<details><summary>{text(name)}</summary>{_one(report, name, 'h2')}</details>")
    return "\n".join(parts)


def _chart(rows: Sequence[Row]) -> str:
    """The primary metric against latency, with the numbers of the table; empty with fewer than two points."""
    name, title = markdown.metric_of(rows), text(markdown.title_of(rows))
    if name is None:
        return ""
    points = [(n, row.p50_ms, row.quality.value if row.quality else None) for n, row in enumerate(rows, 1)]
    known = [(n, x, y) for n, x, y in points if x is not None and y is not None]
    if len(known) < 2:
        return ""
    width, height, left, bottom = 560, 260, 60, 220
    right_x = max(x for _, x, _ in known) * 1.1 or 1.0
    low, high = min(y for *_, y in known), max(y for *_, y in known)
    margin = (high - low) * 0.15 or 0.01
    low, high = low - margin, high + margin
    ends = [metrics.of(name).number(end) for end in (low, high)]
    best = markdown.best_of(rows)
    marks = []
    for n, x, y in known:
        cx = left + (width - left - 30) * x / right_x
        cy = bottom - (bottom - 20) * (y - low) / (high - low)
        tone = "new" if best[n - 1] else "old"
        marks.append(f'<circle class="{tone}" cx="{cx:.1f}" cy="{cy:.1f}" r="6"/>')
        marks.append(f'<text x="{cx + 9:.1f}" y="{cy + 4:.1f}">{n}</text>')
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title} against latency; the numbers are in the table">'
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{width - 10}" y2="{bottom}"/>'
        f'<line class="axis" x1="{left}" y1="10" x2="{left}" y2="{bottom}"/>'
        f'<text x="4" y="24">{ends[1]}</text><text x="4" y="{bottom}">{ends[0]}</text>'
        f'<text x="{left}" y="{bottom + 18}">0</text>'
        f'<text x="{width - 40}" y="{bottom + 18}" text-anchor="end">{text(facts.number(right_x))} ms</text>'
        f'<text x="{left}" y="{bottom + 36}">{title} over p50 at batch 1; blue: Pareto</text>'
        f"{''.join(marks)}</svg>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{text(title)}</h2>\n{body}" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""


def _list(items: Iterable[str]) -> str:
    found = "".join(f"<li>{text(item)}</li>" for item in items)
    return f"<ul>{found}</ul>" if found else ""


def _pairs(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{text(key)}</th><td>{_value(value)}</td></tr>" for key, value in values.items())
    return f"<table>{rows}</table>" if rows else ""


def _records(rows: Sequence[dict[str, Any]]) -> str:
    """A table of dictionaries: a column for every key, in the order in which the keys appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return ""
    numeric = {key for key in keys if all(isinstance(row.get(key), int | float | None) for row in rows)}
    head = "".join(f"<th{_side(key in numeric)}>{text(key)}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td{_side(key in numeric)}>{_value(row.get(key))}</td>" for key in keys) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _side(right: bool) -> str:
    return ' class="n"' if right else ""


def _value(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return '<span class="soft">-</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text(f"{value:.6g}")
    if isinstance(value, dict) and not any(isinstance(one, dict | list) for one in value.values()):
        return text(", ".join(f"{key}={one}" for key, one in value.items()))
    if isinstance(value, dict | list):
        return text(json.dumps(value, ensure_ascii=False, default=str))
    return text(value)


def _json(value: Any) -> str:
    lines = json.dumps(value, indent=2, ensure_ascii=False, default=str).split("\n")
    return "\n".join(text(line) for line in lines)
