"""What led to a model, and which of the rows that it is measured on had a say in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcli.models.checkpoint import Checkpoint
from kdcli.report import io
from kdcli.report.redact import redact
from kdcli.report.schema import LineageEntry, Measurement, Warning_


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
