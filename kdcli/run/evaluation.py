"""Evaluate: measure models on the same rows, compare, judge the gates, change nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kdcli import __version__, devices
from kdcli.data import recorded as recorded_data
from kdcli.data.labels import printable
from kdcli.errors import InputError, UsageError
from kdcli.export import files, own_graph
from kdcli.export import graph as graphs
from kdcli.inputs import picked as picked_rows
from kdcli.inputs import reading, splits
from kdcli.measure import answers, comparison, environment, measurement, quality
from kdcli.models import graph_only, safety, tokenizers
from kdcli.models.checkpoint import Checkpoint, quiet
from kdcli.models.references import Resolved
from kdcli.probe import soundness
from kdcli.progress import Progress
from kdcli.report import ci, gates, html, io
from kdcli.report.redact import redact
from kdcli.report.schema import Measurement, Method, ModelInfo, Report, Warning_
from kdcli.request import EvaluateOptions, Request
from kdcli.run import life, output, preflight
from kdcli.run import lineage as lineages
from kdcli.run.life import Outcome
from kdcli.timing import Timings

_OF_GRAPH = "quality and size here are those of the graph"
_OF_TORCH = "quality here is that of the checkpoint, size that of the graph"
RUNTIMES = {"onnx": ("onnx",), "torch": ("torch",), "both": ("onnx", "torch")}


@dataclass
class _Judged:
    source: str
    checkpoint: Checkpoint
    timed: measurement.Timed
    warnings: list[Warning_]
    agreement: own_graph.Agreement | None  # of its own graph with the checkpoint beside it

    @property
    def measured(self) -> measurement.Measured:
        return self.timed.measured

    @property
    def graph(self) -> Path | None:
        return self.timed.graph


def run(request: Request, progress: Progress) -> Outcome:
    """Measure every model of the request and judge the gates on each.

    Without ``--baseline`` a model is compared with the first model of its lineage, as that one's report
    recorded it. With ``-o`` the (single) model is copied there with its ONNX export and the report.
    """
    options = request.options
    assert isinstance(options, EvaluateOptions)
    timings = Timings()
    found = preflight.check(request)
    out = preflight.place(request, found)
    first = found[-1] if options.baseline is not None else None
    models = found[: len(found) - (first is not None)]
    devices.device_of(request.common.device)
    request = preflight.settle_data(request, models[0].path)
    dataset = life.load_data(request, [one.path for one in found], progress)
    picked = picked_rows.pick(dataset, options.split, request.common.limit)
    baseline = None
    if first is not None:
        progress.phase(f"measure baseline {first.ref}")
        baseline = _measure(request, options, first, dataset, picked, timings, progress)
    ours: list[_Judged] = []
    for model in models:
        progress.phase(f"measure {model.ref}")
        ours.append(_measure(request, options, model, dataset, picked, timings, progress))
    progress.phase("measure latency")
    judges = [baseline, *ours] if baseline is not None else ours
    if dataset.ids:
        _check_ids(judges)
    everyone = [one.timed for one in judges]
    measurement.time_together(everyone, _conditions(request, options, timings, progress))
    reports = [_report(request, options, one, baseline, dataset, picked, timings) for one in ours]
    if out is not None:
        reports = [_write(ours[0], reports[0], out, timings, force=request.common.force)]
    if options.html is not None:
        _write_text(options.html, html.page(reports))
    if options.junit is not None:
        _write_text(options.junit, ci.junit(reports))
    if options.summary is not None:
        for report in reports:
            ci.step_summary(options.summary, report)
    # A bare graph is named itself: its directory may hold another one.
    return Outcome(out or models[0].graph or models[0].path, _worst(reports), reports)


def _measure(
    request: Request,
    options: EvaluateOptions,
    found: Resolved,
    dataset: life.Dataset,
    picked: picked_rows.Picked,
    timings: Timings,
    progress: Progress,
) -> _Judged:
    device = devices.device_of(request.common.device)
    devices.seed_everything(request.common.seed)
    conditions = _conditions(request, options, timings, progress)
    with timings.phase("load"):
        loaded = own_graph.load(found, device=device)
        checkpoint, warnings = loaded.checkpoint, list(loaded.warnings)
        if not checkpoint.has_head:
            raise InputError(f"'{found.ref}' has no classification head, so there is nothing to evaluate")
        own_graph.check(loaded, RUNTIMES[options.runtime])
        encoded = splits.Splits(dataset, checkpoint, progress)
    split, rows = picked.split, picked.of(encoded)
    weights = not graph_only.is_one(checkpoint)
    warnings += reading.check_reading(checkpoint, dataset.splits[split], encoded[split], split)
    warnings += reading.told(checkpoint, {split: encoded[split]})
    if weights:
        warnings += soundness.probe(checkpoint, encoded[split])
    graph, agreed = loaded.graph, None
    if graph is None:
        optional = options.runtime == "torch" and request.common.out is None
        graph, told = (graphs.of_teacher if optional else graphs.of_input)(
            checkpoint, encoded[split], threads=conditions.threads, timings=timings, progress=progress
        )
        warnings += told
    elif weights:
        with timings.phase("parity"):
            agreed = own_graph.agreement(checkpoint, graph, rows, threads=conditions.threads)
        if agreed.differs:
            by_torch = options.runtime == "torch"
            warnings.append(own_graph.differ(checkpoint, graph, agreed, _OF_TORCH if by_torch else _OF_GRAPH))
            weights = by_torch
    measured = measurement.measure(
        checkpoint,
        graph,
        rows,
        picked.split,
        conditions,
        title=found.ref,
        rows_sha256=picked.sha256,
        weights=weights,
    )
    timed = measurement.Timed(checkpoint, graph, rows, measured)
    return _Judged(found.ref, checkpoint, timed, warnings, agreed)


def _check_ids(judges: list[_Judged]) -> None:
    """Refuse models that a number in the data would mean different labels of.

    Raises:
        InputError: Two models have the same labels in another order.
    """
    first = judges[0]
    for one in judges[1:]:
        ours, theirs = first.checkpoint.labels, one.checkpoint.labels
        if ours != theirs and set(ours) == set(theirs):
            at = next(i for i, name in enumerate(ours) if theirs[i] != name)
            raise InputError(
                f"with :ids in --columns a number means another label to '{one.source}' "
                f"({at} is {printable(theirs[at])}) than to '{first.source}' ({at} is {printable(ours[at])}), "
                "so they can't be compared",
                "write the names of the labels into the data",
            )


def _conditions(
    request: Request, options: EvaluateOptions, timings: Timings, progress: Progress
) -> measurement.Conditions:
    return measurement.Conditions(
        threads=environment.threads(),
        device=devices.session_device(devices.device_of(request.common.device)),
        batch_sizes=options.batch_sizes,
        runtimes=RUNTIMES[options.runtime],
        timings=timings,
        progress=progress,
    )


def _report(
    request: Request,
    options: EvaluateOptions,
    one: _Judged,
    baseline: _Judged | None,
    dataset: life.Dataset,
    picked: picked_rows.Picked,
    timings: Timings,
) -> Report:
    after = one.measured.measurement
    lineage = lineages.lineage_of(one.checkpoint, one.source, after)
    labels = one.timed.encoded.labels
    assert labels is not None
    warnings = [
        *one.checkpoint.doubts,
        *one.warnings,
        *life.of_data(dataset),
        *answers.doubts(one.measured.logits, labels, one.checkpoint.labels),
        *lineages.selected(lineage, picked.split, picked.split_sha256),
    ]
    before: Measurement | None = None
    delta, reasons = comparison.compare(None, after), dict[str, str]()
    if baseline is not None:
        before = baseline.measured.measurement
        delta = comparison.compare(before, after)
        if set(baseline.checkpoint.labels) == set(one.checkpoint.labels):
            order = [baseline.checkpoint.labels.index(name) for name in one.checkpoint.labels]
            rows = one.timed.encoded
            assert rows.labels is not None
            delta = comparison.row_by_row(
                delta,
                quality.compare(
                    baseline.measured.logits[:, order].argmax(1),
                    one.measured.logits.argmax(1),
                    rows.labels,
                ),
            )
    elif len(one.checkpoint.log.lineage) > 1 and (recorded := io.recorded(lineage[0])) is not None:
        before = comparison.from_record(recorded, after)
        delta = comparison.compare(before, after)
        told, reasons = comparison.of_record(recorded, before, lineage[0].model)
        warnings.extend(told)
    warnings.extend(comparison.honest(delta, before, after))
    verdicts = gates.judge(request.common.gates, before, after, delta, reasons)
    report = Report(
        schema_version=2,
        kind="kdcli.report",
        complete=True,
        exit_code=0,
        kdcli_version=__version__,
        stage="evaluate",
        command=[redact(part) for part in request.argv],
        config=life.config_of(request),
        model=ModelInfo(
            source=redact(one.source),
            family=one.checkpoint.model_type,
            task="text-classification",
            labels=one.checkpoint.labels,
        ),
        data=recorded_data.info(dataset, str(request.common.data), request.common.out),
        before=before,
        after=after,
        delta=delta,
        method=Method(
            name="evaluate",
            params={"runtime": options.runtime, "split": options.split},
            detail={} if one.agreement is None else {"checkpoint": one.agreement.to_json()},
            layers=[],
        ),
        parity=None,
        gates=verdicts,
        lineage=lineage,
        environment=environment.environment(str(one.checkpoint.device), request.common.seed),
        timings=timings.rounded(),
        warnings=life.unique(warnings),
        artifacts=[],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return report.model_copy(update={"exit_code": int(report.verdict)})


def _write(one: _Judged, report: Report, out: Path, timings: Timings, *, force: bool) -> Report:
    """Copy the model unchanged, with the graph that was judged, the card and the report.

    Where plain transformers, which the card has people call, would make another tokenizer out of the copy, its settings
    name the class that reads it rightly.
    """
    source, tokenizer = one.checkpoint.path, one.checkpoint.tokenizer
    assert one.graph is not None
    beside = files.beside(one.graph)
    copied = [path for path in sorted(source.iterdir()) if path.is_file() and _belongs(path)]
    needed = sum(path.stat().st_size for path in (*copied, one.graph, *beside))
    with output.building(out, needed + (64 << 20)) as work:
        for path in copied:
            shutil.copyfile(path, work / path.name)
        shutil.copyfile(one.graph, work / own_graph.FILE)
        for path in beside:
            place = work / path.relative_to(one.graph.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        with quiet():
            if not tokenizers.plainly_alike(tokenizer, work, tokenizer.padding_side):
                tokenizers.save(tokenizer, source, work, max_length=one.checkpoint.max_length)
        report = life.finish(report, work, timings)
        output.publish(work, out, force=force)
    return report


def _belongs(path: Path) -> bool:
    """Whether a file is copied with a model: not what is written anew, no graph but the judged one, no pickle."""
    name = path.name
    return (
        name not in ("report.json", "README.md") and ".onnx" not in name and path.suffix not in safety.PICKLES
    )


def _write_text(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error


def _worst(reports: list[Report]) -> Report:
    return max(reports, key=lambda report: report.exit_code)
