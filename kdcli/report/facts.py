"""What a report says, as rows of words and numbers; shared by every way of showing it."""

from __future__ import annotations

import math
import ntpath
import posixpath
import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from kdcli.errors import ExitCode
from kdcli.report.schema import Gate, Latency, LineageEntry, Measurement, MetricValue, Report

Kind = Literal["score", "count", "bytes", "ms", "rate"]

# (lower, higher): what to call an `after` that is below or above `before`.
_WORDS: dict[Kind, tuple[str, str]] = {
    "count": ("fewer", "more"),
    "bytes": ("smaller", "larger"),
    "ms": ("faster", "slower"),
    "rate": ("less", "more"),
}
# Two runs of one model differ by this much; calling it faster or slower would be false.
_NOISE: dict[Kind, float] = {"count": 0.0, "bytes": 0.0, "ms": 0.02, "rate": 0.02}
_SIZES: tuple[tuple[str, str, Kind], ...] = (
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
"""McNemar p-value from which on a difference in accuracy counts as noise."""


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


def probability(value: float) -> str:
    """``p = 0.03``, or a bound where the digits mean nothing."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


@dataclass(frozen=True)
class Fact:
    """One number of two models, side by side."""

    name: str
    kind: Kind
    before: float | None
    after: float | None
    lower_is_better: bool
    before_error: float | None = None
    after_error: float | None = None
    p_value: float | None = None  # of the difference, where it was tested

    @property
    def texts(self) -> tuple[str, str]:
        """``before`` and ``after`` as they are printed; a dash for what was not measured."""
        if self.kind == "score":
            return score(self.before, self.before_error), score(self.after, self.after_error)
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
        if self.kind == "score":
            tested = self.p_value is None or self.p_value < SIGNIFICANT
            return tested and round(self.after - self.before, 4) != 0
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
        if self.kind == "score":
            return self._score_change(self.after - self.before)
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

    def _score_change(self, difference: float) -> str:
        if round(difference, 4) == 0:
            return "same"
        if not self.differs:
            assert self.p_value is not None
            return f"{difference:+.4f}, within noise ({probability(self.p_value)})"
        return f"{difference:+.4f}, {'better' if self.better else 'worse'}"


def comparison(report: Report) -> list[Fact]:
    """Every number that at least one of the two models has, in the order of the report."""
    before, after = report.before, report.after
    facts: list[Fact] = [
        _score("accuracy", "accuracy", before, after, report.delta.p_value),
        _score("macro F1", "macro_f1", before, after),
        _score("calibration error (ECE)", "ece", before, after),
    ]
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


def _score(
    name: str, field: str, before: Measurement | None, after: Measurement, p_value: float | None = None
) -> Fact:
    old: MetricValue | None = (
        getattr(before.quality, field) if before is not None and before.quality else None
    )
    new: MetricValue | None = getattr(after.quality, field) if after.quality else None
    known = new or old
    return Fact(
        name,
        "score",
        None if old is None else old.value,
        None if new is None else new.value,
        lower_is_better=known is not None and not known.higher_is_better,
        before_error=None if old is None else old.stderr,
        after_error=None if new is None else new.stderr,
        p_value=p_value,
    )


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
    if quantity in ("accuracy", "macro_f1", "ece", "drop", "agreement"):
        # All digits: 0.89996 shown as 0.9000 beside a missed ">=0.9" reads as a bug.
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
    parts = []
    if delta.agreement is not None:
        parts.append(f"same answer as before on {100 * delta.agreement:.2f} % of rows")
    if delta.p_value is not None:
        rows = f"{delta.lost} rows lost and {delta.won} won, " if delta.lost is not None else ""
        parts.append(f"{rows}McNemar {probability(delta.p_value)}")
    if delta.accuracy_ci95 is not None:
        low, high = delta.accuracy_ci95
        parts.append(f"95 % interval of the change in accuracy {low:+.4f} to {high:+.4f}")
    return "; ".join(parts)


@dataclass(frozen=True)
class Sensitivity:
    """What the model's answers lose when one sub-layer alone loses a share of its units."""

    layer: int
    part: str  # heads or neurons
    removed: float  # share of its units, in [0, 1]
    kl: float  # KL divergence of the answers from those of the dense model, nats, mean over the rows


def sensitivity(report: Report) -> list[Sensitivity]:
    """The sensitivity table of a prune report; empty where there is none, rows that are none left out."""
    found = report.method.detail.get("sensitivity") if report.method else None
    rows = []
    for row in found if isinstance(found, list) else []:
        if not isinstance(row, dict):
            continue
        layer, part, removed, kl = (row.get(key) for key in ("layer", "part", "removed", "kl"))
        if (
            isinstance(layer, int)
            and part in ("heads", "neurons")
            and _finite(removed)
            and _finite(kl)
            and 0 <= removed <= 1
        ):
            rows.append(Sensitivity(layer, part, float(removed), max(0.0, float(kl))))
    return sorted(rows, key=lambda row: (row.layer, row.part, row.removed))


def sensitivity_text(report: Report) -> str:
    """The most and the least sensitive sub-layer in one sentence; empty without a table."""
    halves: dict[tuple[int, str], Sensitivity] = {}
    for row in sensitivity(report):  # of each sub-layer the row nearest to half
        known = halves.get((row.layer, row.part))
        if known is None or abs(row.removed - 0.5) < abs(known.removed - 0.5):
            halves[row.layer, row.part] = row
    if len(halves) < 2:
        return ""
    ranked = sorted(halves.values(), key=lambda row: row.kl)
    most, least = (
        f"the {row.part} of layer {row.layer} (KL {number(row.kl)} nats with {100 * row.removed:.0f} % removed)"
        for row in (ranked[-1], ranked[0])
    )
    return f"pruned alone, {most} changed the answers most, {least} least"


def tries(report: Report) -> list[dict[str, Any]]:
    """The tries of a search for the amount, one row each; empty where the amount was given."""
    detail = report.method.detail if report.method else {}
    for key in ("search", "target_speedup"):
        one = detail.get(key)
        rows = one.get("tries") if isinstance(one, dict) else None
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return rows
    return []


def amount_text(report: Report) -> str:
    """How the amount was found, in one sentence; empty where it was given."""
    rows, detail = tries(report), report.method.detail if report.method else {}
    if not rows:
        return ""
    many = f"{len(rows)} {'try' if len(rows) == 1 else 'tries'}"
    if isinstance(found := detail.get("target_speedup"), dict):
        chosen = next((row for row in rows if row.get("measured") == found.get("measured")), rows[-1])
        asked, predicted, measured = found.get("target"), chosen.get("predicted"), chosen.get("measured")
        if _finite(asked) and _finite(predicted) and _finite(measured):
            return (
                f"{asked:g} times faster at batch 1 was asked for: {predicted:.2f} predicted, "
                f"{measured:.2f} measured when it was cut, {many}"
            )
        return ""
    found = detail["search"]
    limit, share = found.get("max_drop"), report.method.params.get("sparsity") if report.method else None
    if _finite(limit) and _finite(share):
        held = any(row.get("kept") is True for row in rows)
        return (
            f"{100 * share:.1f} % removed is {'the most' if held else 'the nearest'} of {many} "
            f"{'that keeps' if held else 'to'} a drop of {limit:g} on the validation rows"
        )
    return ""


_CONTROLS = {
    "labels": "the labels alone",
    "labels+dropout": "the labels and dropout",
    "labels+texts": "the labels and the same further texts",
    "labels+texts+dropout": "the labels, the same further texts and dropout",
}


def control_text(report: Report) -> str:
    """What a student reaches without its teacher, in one sentence; empty where there was no control."""
    found = report.method.detail.get("control") if report.method else None
    return (isinstance(found, dict) and control_words(found)) or ""


def control_words(found: dict[str, Any]) -> str | None:
    """The same of the control's own part of a report; None where it does not hold what it should."""
    own, rows = found.get("student_accuracy"), found.get("runs")
    runs = [run for run in rows if isinstance(run, dict)] if isinstance(rows, list) else []
    if not (_finite(own) and runs and all(_finite(run.get("accuracy")) for run in runs)):
        return None
    without = ", ".join(
        f"{100 * run['accuracy']:.2f} % with {_CONTROLS.get(str(run.get('name')), str(run.get('name')))}"
        for run in runs
    )
    best = max(runs, key=lambda run: float(run["accuracy"]))
    gain, p_value = own - best["accuracy"], best.get("p_value")
    tested = f" ({probability(p_value)})" if _finite(p_value) else ""
    over = "over the best of them" if len(runs) > 1 else "over that"
    return (
        f"accuracy on {found.get('split')}: {100 * own:.2f} % distilled; without the teacher {without}; "
        f"the teacher gives {100 * gain:+.2f} points {over}{tested}"
    )


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
