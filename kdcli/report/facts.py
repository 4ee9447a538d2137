"""What a report says, as rows of words and numbers; shared by every way of showing it."""

from __future__ import annotations

import math
import ntpath
import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdcli.errors import ExitCode
from kdcli.report import metrics
from kdcli.report.gates import GENERAL
from kdcli.report.schema import Gate, Latency, LineageEntry, Measurement, MetricValue, Report

ValueKind = Literal["score", "open", "count", "bytes", "ms", "rate"]

# (lower, higher): what to call an `after` that is below or above `before`.
_WORDS: dict[ValueKind, tuple[str, str]] = {
    "count": ("fewer", "more"),
    "bytes": ("smaller", "larger"),
    "ms": ("faster", "slower"),
    "rate": ("less", "more"),
}
# Two runs of one model differ by this much; calling it faster or slower would be false.
_NOISE: dict[ValueKind, float] = {"count": 0.0, "bytes": 0.0, "ms": 0.02, "rate": 0.02}
_SIZES: tuple[tuple[str, str, ValueKind], ...] = (
    ("parameters", "parameters", "count"),
    ("non-zero parameters", "nonzero_parameters", "count"),
    ("checkpoint", "checkpoint_bytes", "bytes"),
    ("model.onnx", "onnx_bytes", "bytes"),
    ("model.onnx, gzipped", "onnx_gzip_bytes", "bytes"),
)
ALARMS = {
    "one-answer": "the model gives every row the same answer",
    "majority": "the model is no better than always giving the most frequent answer",
}
"""Warnings that are as loud as a missed gate, because no other number shows what they say."""
MANY_ZEROS = 0.01
"""Share of the weights from which on zeros are worth a word: a trained model has a few of its own."""
SIGNIFICANT = 0.05
"""Paired p-value from which on a difference in the primary metric counts as noise."""


def visible(text: str) -> str:
    """Make control, direction and surrogate characters visible: no name can steer a terminal or a log.

    >>> visible("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """Three significant digits without an exponent for everyday sizes."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def count(value: float | None) -> str:
    """``4.41 M`` for 4 405 270."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """``16.8 MiB`` for 17 631 167 bytes."""
    if value is None:
        return "-"
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= step:
            return f"{number(value / step)} {unit}"
    return f"{value:g} B"


def score(value: float | None, stderr: float | None = None) -> str:
    """``0.8058 ± 0.0059``, the standard error where it is known."""
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def value_text(name: str, one: MetricValue | None) -> str:
    """A metric as :func:`score` writes it; one without an upper end with four digits."""
    if one is None or metrics.of(name).scale != "open":
        return score(None if one is None else one.value, None if one is None else one.stderr)
    return _open(one.value, one.stderr)


def _open(value: float | None, stderr: float | None = None) -> str:
    """``3.142 ± 0.05``."""
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")


def probability(value: float) -> str:
    """``p = 0.03``, or a bound where the digits mean nothing."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


@dataclass(frozen=True)
class Fact:
    """One number of two models, side by side."""

    name: str
    kind: ValueKind  # ``open``: a metric without an upper end; ``score``: every other metric
    before: float | None
    after: float | None
    lower_is_better: bool
    before_error: float | None = None
    after_error: float | None = None
    p_value: float | None = None  # of the difference, where it was tested
    ci95: tuple[float, float] | None = None  # of the difference, paired
    minor: bool = False  # the console leaves it out

    @property
    def texts(self) -> tuple[str, str]:
        """``before`` and ``after`` as they are printed; a dash for what was not measured."""
        if self.kind in ("score", "open"):
            written = score if self.kind == "score" else _open
            return written(self.before, self.before_error), written(self.after, self.after_error)
        show = {"count": count, "bytes": size, "ms": number, "rate": number}[self.kind]
        unit = " ms" if self.kind == "ms" else " /s" if self.kind == "rate" else ""
        first, second = (
            show(value) + (unit if value is not None else "") for value in (self.before, self.after)
        )
        return first, second

    @property
    def differs(self) -> bool:
        """Whether both are known and their difference is more than noise."""
        if self.before is None or self.after is None:
            return False
        if self.kind in ("score", "open"):
            return self._noise is None and not self._same
        if self.before <= 0 or self.after <= 0:
            return False
        return max(self.after / self.before, self.before / self.after) > 1 + _NOISE[self.kind]

    @property
    def better(self) -> bool | None:
        """Whether ``after`` is the better one; None when it is no different or unknown."""
        if self.before is None or self.after is None or not self.differs:
            return None
        return (self.after < self.before) == self.lower_is_better

    @property
    def change(self) -> str:
        """The difference in words: ``3.90x smaller``, ``-0.0120, worse``, ``same``."""
        if self.before is None or self.after is None:
            return ""
        if self.kind in ("score", "open"):
            return self._metric_change(self.after - self.before)
        if self.before == self.after:
            return "same"
        if self.before <= 0 or self.after <= 0:
            return ""
        if not self.differs:
            return "same within 2 %"
        ratio = self.after / self.before
        times = max(ratio, 1 / ratio)
        shown = f"{times:.2f}" if times < 10 else f"{times:.1f}" if times < 100 else f"{times:.0f}"
        return f"{shown}x {_WORDS[self.kind][ratio > 1]}"

    @property
    def _same(self) -> bool:
        """Of a metric: whether nothing of the difference would be printed."""
        assert self.before is not None
        assert self.after is not None
        if self.kind == "open":
            return self.texts[0].split()[0] == self.texts[1].split()[0]
        return round(self.after - self.before, 4) == 0

    @property
    def _noise(self) -> str | None:
        """Of a metric: what says that the difference may be chance; None where nothing does."""
        if self.p_value is not None:
            return None if self.p_value < SIGNIFICANT else probability(self.p_value)
        if self.ci95 is not None and self.ci95[0] <= 0 <= self.ci95[1]:
            return f"95 % interval {_signed(self.ci95[0], self.kind)} to {_signed(self.ci95[1], self.kind)}"
        return None

    def _metric_change(self, difference: float) -> str:
        if self._same:
            return "same"
        shown = _signed(difference, self.kind)
        if (noise := self._noise) is not None:
            return f"{shown}, within noise ({noise})"
        return f"{shown}, {'better' if self.better else 'worse'}"


def _signed(difference: float, kind: ValueKind) -> str:
    return f"{difference:+.4g}" if kind == "open" else f"{difference:+.4f}"


def comparison(report: Report) -> list[Fact]:
    """Every number that at least one of the two models has: the primary metric, the others, then what it costs."""
    before, after = report.before, report.after
    facts = _metrics(report)
    for name, field, kind in _SIZES:
        old = None if before is None else getattr(before.size, field)
        facts.append(Fact(name, kind, old, getattr(after.size, field), True))
    # MACs of rows of different lengths say nothing about the models.
    old_macs = before.compute.macs if before and before.compute.sequence == after.compute.sequence else None
    length = f" ({after.compute.sequence} tokens)" if after.compute.sequence is not None else ""
    facts.append(Fact(f"multiply-accumulates{length}", "count", old_macs, after.compute.macs, True))
    for new in after.latency:
        earlier = same_setting(before, new)
        where = f"{new.runtime}, batch {new.batch}"
        old_p50 = None if earlier is None else earlier.p50_ms
        old_rate = None if earlier is None else earlier.throughput_per_s
        facts.append(Fact(f"latency p50, {where}", "ms", old_p50, new.p50_ms, True))
        facts.append(Fact(f"throughput, {where}", "rate", old_rate, new.throughput_per_s, False))
    return [fact for fact in facts if fact.before is not None or fact.after is not None]


def zero_share(measurement: Measurement) -> float:
    """Share of the weights that are zero; 0 where it was not counted."""
    total, nonzero = measurement.size.parameters, measurement.size.nonzero_parameters
    return 1 - nonzero / total if total and nonzero is not None else 0.0


def same_setting(measurement: Measurement | None, like: Latency) -> Latency | None:
    """The latency of the same runtime, batch size and thread count."""
    if measurement is None:
        return None
    wanted = (like.runtime, like.batch, like.threads)
    return next((one for one in measurement.latency if (one.runtime, one.batch, one.threads) == wanted), None)


def primary_of(report: Report) -> str | None:
    """Name of the primary metric; None where no quality was measured."""
    known = [
        one.quality for one in (report.after, report.before) if one is not None and one.quality is not None
    ]
    return known[0].primary if known else None


def _metrics(report: Report) -> list[Fact]:
    sides = (report.before, report.after)
    old, new = ({} if one is None or one.quality is None else one.quality.metrics for one in sides)
    primary = primary_of(report)
    names = [] if primary is None else list(dict.fromkeys((primary, *new, *old)))
    found = []
    for name in names:
        known, first, second = metrics.of(name), old.get(name), new.get(name)
        one = second or first
        assert one is not None
        tested = name == report.delta.primary == primary
        found.append(
            Fact(
                known.title,
                "open" if known.scale == "open" else "score",
                None if first is None else first.value,
                None if second is None else second.value,
                lower_is_better=not one.higher_is_better,
                before_error=None if first is None else first.stderr,
                after_error=None if second is None else second.stderr,
                p_value=report.delta.p_value if tested else None,
                ci95=report.delta.ci95 if tested else None,
                minor=known.minor and name != primary,
            )
        )
    return found


def alarm(report: Report) -> str | None:
    """What makes a good number worthless, in a few words; None where nothing does."""
    codes = {one.code for one in report.warnings}
    return next((words for code, words in ALARMS.items() if code in codes), None)


def verdict_text(report: Report) -> str:
    """The outcome in a few words."""
    if report.verdict == ExitCode.PARITY:
        return "FAILED: the ONNX export does not agree with the checkpoint"
    missed = sum(not gate.passed for gate in report.gates)
    if missed:
        return f"FAILED: {missed} of {len(report.gates)} gates missed"
    met = f"all {len(report.gates)} gates met" if report.gates else "no gates asked for"
    if (words := alarm(report)) is not None:
        return f"BUT {words}: {met}"
    return f"passed: {met}" if report.gates else f"done, {met}"


def files_text(report: Report) -> str:
    """Which files the numbers come from, in one sentence; empty for a report of an older version."""
    files = report.after.files
    if files is None:
        return ""
    weights = ", ".join(files.weights)
    graph = f"an ONNX export of {weights}" if files.graph == "export" else files.graph
    if files.graph is None:
        return f"quality and latency are those of {weights} in torch; the model has no ONNX form"
    if files.quality == "torch":
        said = [f"quality is that of {weights} in torch, size that of {graph}"]
    else:
        said = [f"quality, latency and size are those of {graph}"]
        if files.graph == "export":
            said.append("the directory has no ONNX file of its own")
        elif weights:
            said.append(f"parameters and multiply-accumulates those of {weights}")
        else:
            said.append("no weights are counted, because none belong to it")
    found = report.method.detail.get("checkpoint") if report.method else None
    if isinstance(found, dict) and isinstance(found.get("same"), int) and isinstance(found.get("rows"), int):
        said.append(f"it answers as the checkpoint beside it on {found['same']} of {found['rows']} rows")
    return "; ".join(said)


def gate_value(expression: str, value: float | None) -> str:
    """A gate's number in the unit of its name."""
    if value is None or not math.isfinite(value):
        return "not measured"
    quantity = re.split(r"[^a-z0-9_]", expression, maxsplit=1)[0]
    if quantity.endswith("_bytes"):
        return f"{size(value)} ({value:.0f} bytes)"
    if quantity in ("drop", "agreement") or quantity not in GENERAL:
        # A metric, with all digits: 0.89996 shown as 0.9000 beside a missed ">=0.9" reads as a bug.
        return f"{value:.6g}"
    return f"{value:.3g}" if quantity == "p_value" else number(value)


def gate_text(gate: Gate) -> str:
    """A gate's number, and why there is none."""
    value = gate_value(gate.expression, gate.value)
    return value if gate.reason is None else f"{value}: {gate.reason}"


def parity_text(report: Report) -> str:
    """The check of the export in one sentence; empty when there was none."""
    parity = report.parity
    if parity is None:
        return ""
    parts = [f"{len(parity.shapes)} input shapes"]
    if parity.max_abs_diff is not None:
        allowed = "" if parity.tolerance is None else f" (allowed {parity.tolerance:.3g})"
        parts.append(f"largest difference of a logit {parity.max_abs_diff:.3g}{allowed}")
    if parity.top1_agreement is not None:
        parts.append(f"same answer on {100 * parity.top1_agreement:.2f} % of rows")
    return f"{'agrees' if parity.passed else 'DOES NOT AGREE'} with the checkpoint: {', '.join(parts)}"


def delta_text(report: Report) -> str:
    """How often the answers changed; empty when that was not measured."""
    delta = report.delta
    known = metrics.of(delta.primary or "")
    parts = []
    if delta.agreement is not None:
        share = f"{100 * delta.agreement:.2f} %"
        ordered = f"{share} of the pairs of rows in the same order as before"
        parts.append(ordered if known.ordered else f"same answer as before on {share} of rows")
    if delta.p_value is not None:
        rows = f"{delta.lost} rows lost and {delta.won} won, " if delta.lost is not None else ""
        parts.append(f"{rows}{known.test} {probability(delta.p_value)}")
    if delta.ci95 is not None:
        low, high = (f"{end:+.4g}" if known.scale == "open" else f"{end:+.4f}" for end in delta.ci95)
        parts.append(f"95 % interval of the change in {known.title} {low} to {high}")
    return "; ".join(parts)


def values_after(lineage: Sequence[LineageEntry]) -> tuple[str, list[str]]:
    """What a column of the values of a lineage is called, and its cells; a cell names its metric where there are
    several."""
    names = {entry.metric for entry in lineage if entry.metric is not None}
    alike = len(names) == 1
    cells = []
    for entry in lineage:
        known = metrics.of(entry.metric or "")
        if entry.value is None:
            cells.append("-")
        else:
            cells.append(known.number(entry.value) if alike else f"{known.title} {known.number(entry.value)}")
    return f"{metrics.of(names.pop()).title if alike else 'quality'} after it", cells


def labels_text(report: Report) -> str:
    """``3 labels``."""
    count_ = len(report.model.labels)
    return f"{count_} label{'' if count_ == 1 else 's'}"


def parameters_of(entry: LineageEntry) -> dict[str, Any]:
    """The settings of a step, without the measurement that the first entry carries along."""
    return {key: value for key, value in entry.params.items() if key != "measurement"}


def public(ref: str) -> str:
    """A reference without the directories of this machine: cards and pages get published.

    >>> public("/home/ann/models/bert"), public("org/name@main"), public("out/student")
    ('bert', 'org/name@main', 'out/student')
    """
    if posixpath.isabs(ref) or ntpath.isabs(ref) or ref.startswith("~"):
        return re.split(r"[/\\]", ref.rstrip("/\\"))[-1] or ref
    return ref


def command_text(report: Report) -> str:
    """The command that was run, quoted for a shell, without this machine's directories."""
    parts = []
    for part in report.command:
        name, sign, value = part.partition("=")
        parts.append(f"{name}{sign}{public(value)}" if sign and name.startswith("-") else public(part))
    return visible(shlex.join(parts))
