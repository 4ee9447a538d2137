"""The report of a run: built in one place, for stages that make a model and for those that judge one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kdcli import __version__
from kdcli.data import recorded
from kdcli.data.sources import Dataset
from kdcli.measure import environment
from kdcli.models.aliases import MODELS
from kdcli.models.checkpoint import Checkpoint
from kdcli.report import card, io
from kdcli.report.redact import redact
from kdcli.report.schema import (
    Artifact,
    Delta,
    Gate,
    LineageEntry,
    Measurement,
    Method,
    ModelInfo,
    Parity,
    Report,
    Warning_,
)
from kdcli.request import Request
from kdcli.tasks.task import Task
from kdcli.timing import Timings


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a run found out about one model."""

    before: Measurement | None
    after: Measurement
    delta: Delta
    gates: list[Gate]
    lineage: list[LineageEntry]
    warnings: Sequence[Warning_]
    method: Method
    parity: Parity | None = None


def build(
    request: Request,
    source: str,
    model: Checkpoint,
    dataset: Dataset,
    out: Path | None,
    judged: Judged,
    *,
    device: str,
) -> Report:
    """Put together the report of one model; its exit code is its verdict.

    Args:
        request: What was asked for.
        source: Reference of the model that the run started from.
        model: The model that ``judged.after`` is of.
        dataset: The rows.
        out: The output directory, from which relative paths in the report are seen.
        judged: What was found out.
        device: Where it ran.
    """
    report = Report(
        schema_version=2,
        kind="kdcli.report",
        complete=True,
        exit_code=0,
        kdcli_version=__version__,
        stage=request.stage,
        command=[redact(part) for part in request.argv],
        config=request.configuration(),
        model=ModelInfo(
            source=redact(source),
            family=model.model_type,
            task=model.task.name,
            labels=model.labels,
        ),
        data=recorded.info(dataset, str(request.common.data), out),
        before=judged.before,
        after=judged.after,
        delta=judged.delta,
        method=judged.method,
        parity=judged.parity,
        gates=judged.gates,
        lineage=judged.lineage,
        environment=environment.environment(device, request.common.seed),
        timings={},
        warnings=unique(judged.warnings),
        artifacts=[],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return report.model_copy(update={"exit_code": int(report.verdict)})


def finish(report: Report, task: Task, work: Path, timings: Timings) -> Report:
    """Write the model card, list the artifacts, then report.json, which marks the directory complete."""
    first = MODELS.get(report.lineage[0].model) if report.lineage else None
    base_model = None if first is None else first.repo
    said = card.card(report, use_of(task), base_model=base_model)
    (work / "README.md").write_text(said, encoding="utf-8")
    artifacts = [
        Artifact(path=path.relative_to(work).as_posix(), bytes=path.stat().st_size, sha256=io.sha256_of(path))
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name != "report.json"
    ]
    report = report.model_copy(update={"artifacts": artifacts, "timings": timings.rounded()})
    io.write(report, work)
    return report


def use_of(task: Task) -> card.Use:
    """What the model card says of the answers of a task."""
    return card.Use(
        of_checkpoint=task.snippet(of_graph=False),
        of_graph=task.snippet(of_graph=True),
        limit=task.limit,
        pipeline_tag=task.pipeline_tag,
    )


def of_data(dataset: Dataset) -> list[Warning_]:
    """What the report says of the data."""
    return [Warning_(code=code, message=message) for code, message in dataset.warnings]


def unique(warnings: Sequence[Warning_]) -> list[Warning_]:
    return list({(w.code, w.message): w for w in warnings}.values())
