"""What led to a model, and which of the rows that it is measured on had a say in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcli.models.checkpoint import Checkpoint
from kdcli.report import io
from kdcli.report.redact import redact
from kdcli.report.schema import LineageEntry, Measurement, Warning_
from kdcli.request import Request
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions

_KEPT_LAST = ("movement",)  # methods of prune whose training ends where it ends
_FLOAT = "the layers that stay in float"


def outcome_of(measurement: Measurement) -> dict[str, Any]:
    """``metric`` and ``value`` of a step: the primary metric, where it was measured."""
    quality = measurement.quality
    if quality is None:
        return {"metric": None, "value": None}
    return {"metric": quality.primary, "value": quality.main.value}


def lineage_of(checkpoint: Checkpoint, source: str, before: Measurement) -> list[LineageEntry]:
    """The stages that led to this checkpoint; a model that kdcli did not make starts its own lineage.

    The first entry keeps its whole measurement, so that a later ``evaluate`` can compare with it.
    """
    entries = io.lineage(checkpoint.log.lineage)
    if not entries:
        first = LineageEntry(
            stage="input",
            method="",
            report_sha256=None,
            model=redact(source),
            **outcome_of(before),
            params={"measurement": before.model_dump(mode="json")},
        )
        return [first]
    report = checkpoint.path / "report.json"
    if report.is_file():
        update = {"report_sha256": io.sha256_of(report), **outcome_of(before)}
        entries[-1] = entries[-1].model_copy(update=update)
    return entries


def chosen(request: Request, detail: dict[str, Any]) -> list[str]:
    """What a stage let the rows of the validation split choose, in words.

    Args:
        request: What was asked for.
        detail: Of the method, in the report: a search leaves its tries there, distill how its teacher got a head.
    """
    options = request.options
    found = []
    if isinstance(options, DistillOptions):
        found = ["the epoch", "whether there is a first phase"] if options.epochs != 1 else ["the training"]
        found += ["the teacher's epoch"] if detail.get("teacher", {}).get("fine_tuned") else []
    elif isinstance(options, PruneOptions):
        found = ["how much was removed"] if "search" in detail else []
        found += ["the tokens that stay"] if "vocab" in options.structure.split("+") else []
        last = options.schedule == "gradual" or options.method in _KEPT_LAST
        found += ["the epoch"] if options.epochs > 1 and not last else []
    elif isinstance(options, LowRankOptions):
        found = ["the budget"] if "search" in detail else []
        found += ["the epoch"] if options.epochs > 1 else []
    elif isinstance(options, QuantizeOptions):
        search = detail.get("search")
        found = ["the scheme"] if options.scheme == "auto" else []
        found += [_FLOAT] if isinstance(search, dict) and search.get("kept") else []
        found += ["the epoch"] if options.epochs > 1 else []
    return found


def selected(lineage: Sequence[LineageEntry], split: str, rows_sha256: str) -> list[Warning_]:
    """A warning where rows that are measured chose something on the way to the model.

    Args:
        lineage: Of the model.
        split: Name of the measured rows.
        rows_sha256: Of all rows of that split.
    """
    told = [
        f"{' and '.join(entry.chosen)} ({entry.stage})"
        for entry in lineage
        if entry.chosen and entry.chosen_on == rows_sha256
    ]
    if not told:
        return []
    return [
        Warning_(
            code="selected-on-measured-rows",
            message=f"the rows of '{split}' that are measured here also chose {', '.join(told)}, so the numbers are "
            "better than on new rows; keep a test split that nothing is chosen on",
        )
    ]
