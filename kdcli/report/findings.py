"""What a stage found out about the model on its way, in words: sensitivity, searches, controls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from kdcli.report import metrics
from kdcli.report.facts import number, probability
from kdcli.report.schema import Report


@dataclass(frozen=True)
class Sensitivity:
    """What the model's answers lose when one sub-layer alone loses a share of its units."""

    layer: int
    part: str  # heads or neurons
    removed: float  # share of its units, in [0, 1]
    kl: float  # the task's divergence of the answers from those of the dense model, mean over the rows


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


def in_nats(report: Report) -> bool:
    """Whether a divergence is a KL in nats: of numbers it is half the squared difference, in their unit."""
    quality = report.after.quality
    return quality is None or not metrics.of(quality.primary).ordered


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
    what, unit = ("KL", " nats") if in_nats(report) else ("divergence", "")
    most, least = (
        f"the {row.part} of layer {row.layer} ({what} {number(row.kl)}{unit} with {100 * row.removed:.0f} % removed)"
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
    "labels+texts": "the labels and the same extra texts",
    "labels+texts+dropout": "the labels, the same extra texts and dropout",
}


def control_text(report: Report) -> str:
    """What a student reaches without its teacher, in one sentence; empty where there was no control."""
    found = report.method.detail.get("control") if report.method else None
    return (isinstance(found, dict) and control_words(found)) or ""


def control_words(found: dict[str, Any]) -> str | None:
    """The same of the control's own part of a report; None where it does not hold what it should.

    That part names its ``metric`` (accuracy, where it is missing): ``student_<metric>`` is the distilled student's,
    ``<metric>`` of a run the control's.
    """
    name = str(found.get("metric", "accuracy"))
    known, own, rows = metrics.of(name), found.get(f"student_{name}"), found.get("runs")
    runs = [run for run in rows if isinstance(run, dict)] if isinstance(rows, list) else []
    if not (_finite(own) and runs and all(_finite(run.get(name)) for run in runs)):
        return None
    without = ", ".join(
        f"{known.percent(run[name])} with {_CONTROLS.get(str(run.get('name')), str(run.get('name')))}"
        for run in runs
    )
    sign = 1 if known.higher_is_better else -1
    best = max(runs, key=lambda run: sign * float(run[name]))
    gain, p_value = sign * (own - best[name]), best.get("p_value")
    gained = f"{100 * gain:+.2f} points" if known.scale == "share" else f"{gain:+.4g}"
    tested = f" ({probability(p_value)})" if _finite(p_value) else ""
    over = "over the best of them" if len(runs) > 1 else "over that"
    return (
        f"{known.title} on {found.get('split')}: {known.percent(own)} distilled; without the teacher {without}; "
        f"the teacher gives {gained} {over}{tested}"
    )


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
