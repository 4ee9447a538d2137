"""The life of ``evaluate``: measure models on the same rows, judge the gates, write what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcli import devices
from kdcli.data.sources import Dataset
from kdcli.errors import UsageError
from kdcli.inputs.picked import Picked, pick
from kdcli.measure import measurement
from kdcli.models.references import Resolved
from kdcli.progress import Progress
from kdcli.report import ci, gates, html
from kdcli.report.schema import Method, Report
from kdcli.request import Request
from kdcli.run import lineage as lineages
from kdcli.run import output, preflight, report_of
from kdcli.run.outcome import Outcome
from kdcli.stages.evaluate import stage
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.evaluate.stage import EvaluatedModel
from kdcli.timing import Timings


def run(request: Request, found: Sequence[Resolved], out: Path | None, progress: Progress) -> Outcome:
    """Measure every model of the request and judge the gates on each.

    Without ``--baseline`` a model is compared with the first model of its lineage, as that one's report
    recorded it. With ``-o`` the (single) model is copied there with its ONNX export and the report.

    Args:
        request: What was asked for.
        found: Its models; the baseline, where there is one, is the last.
        out: The output directory, if one is wanted.
        progress: Observer.
    """
    options = request.options_as(EvaluateOptions)
    timings = Timings()
    first = found[-1] if options.baseline is not None else None
    models = found[: len(found) - (first is not None)]
    devices.device_of(request.common.device)
    request = preflight.settle_data(request, models[0].path)
    dataset = preflight.told_data(request, [one.path for one in found], progress)
    picked = pick(dataset, options.split, request.common.limit)
    baseline = None
    if first is not None:
        progress.phase(f"measure baseline {first.ref}")
        baseline = stage.measure(request, options, first, dataset, picked, timings, progress)
    ours: list[EvaluatedModel] = []
    for model in models:
        progress.phase(f"measure {model.ref}")
        ours.append(stage.measure(request, options, model, dataset, picked, timings, progress))
    progress.phase("measure latency")
    everyone = [baseline, *ours] if baseline is not None else ours
    if dataset.ids:
        stage.check_ids(everyone)
    conditions = stage.conditions_of(request, options, timings, progress)
    measurement.time_together([one.timed for one in everyone], conditions)
    reports = [_report(request, options, one, baseline, dataset, picked, timings) for one in ours]
    if out is not None:
        with output.building(out, stage.bytes_of(ours[0]) + (64 << 20)) as work:
            stage.copy(ours[0], work)
            reports = [report_of.finish(reports[0], ours[0].checkpoint.task, work, timings)]
            output.publish(work, out, force=request.common.force)
    if options.html is not None:
        _write_text(options.html, html.page(reports))
    if options.junit is not None:
        _write_text(options.junit, ci.junit(reports))
    if options.summary is not None:
        for report in reports:
            ci.step_summary(options.summary, report)
    # A bare graph is named itself: its directory may hold another one.
    return Outcome(out or models[0].graph or models[0].path, _worst(reports), reports)


def _report(
    request: Request,
    options: EvaluateOptions,
    one: EvaluatedModel,
    baseline: EvaluatedModel | None,
    dataset: Dataset,
    picked: Picked,
    timings: Timings,
) -> Report:
    after = one.measured.measurement
    lineage = lineages.lineage_of(one.checkpoint, one.source, after)
    labels = one.timed.encoded.labels
    assert labels is not None
    against = stage.compare(one, baseline, lineage)
    warnings = [
        *one.checkpoint.doubts,
        *one.warnings,
        *report_of.of_data(dataset),
        *one.checkpoint.task.doubts(one.measured.logits, labels, one.checkpoint.labels),
        *lineages.selected(lineage, picked.split, picked.split_sha256),
        *against.warnings,
    ]
    report = report_of.build(
        request,
        one.source,
        one.checkpoint,
        dataset,
        request.common.out,
        report_of.Judged(
            before=against.before,
            after=after,
            delta=against.delta,
            gates=gates.judge(request.common.gates, against.before, after, against.delta, against.reasons),
            lineage=lineage,
            warnings=warnings,
            method=Method(
                name="evaluate",
                params={"runtime": options.runtime, "split": options.split},
                detail={} if one.agreement is None else {"checkpoint": one.agreement.to_json()},
                layers=[],
            ),
        ),
        device=str(one.checkpoint.device),
    )
    return report.model_copy(update={"timings": timings.rounded()})


def _write_text(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror}") from error


def _worst(reports: list[Report]) -> Report:
    return max(reports, key=lambda report: report.exit_code)
