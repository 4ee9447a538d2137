"""The one life of a stage.

resolve -> check the chain -> data -> load -> seed, device -> measure before -> apply -> save ->
reload from disk -> export -> parity -> measure after -> gates -> report -> rename.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcli import devices, memory, processes
from kdcli.context import Context, Stage
from kdcli.errors import InputError
from kdcli.export import graph as graphs
from kdcli.inputs import picked as picked_rows
from kdcli.inputs import reading
from kdcli.inputs.splits import Splits
from kdcli.measure import comparison, environment, measurement
from kdcli.models import activations, mapped, placement, transforms
from kdcli.models import checkpoint as checkpoints
from kdcli.models.references import Resolved
from kdcli.probe import soundness
from kdcli.progress import Progress
from kdcli.report import gates
from kdcli.report.schema import (
    LineageEntry,
    Report,
)
from kdcli.request import Request
from kdcli.run import evaluation, lineage, output, preflight, report_of
from kdcli.run.outcome import Outcome
from kdcli.run.report_of import Judged
from kdcli.timing import Timings
from kdcli.training import distributed

BATCH_SIZES = (1, 32)


def run(request: Request, progress: Progress, resolved: Sequence[Resolved] | None = None) -> Outcome | None:
    """Run one stage from its input to its published output directory.

    Args:
        request: What is asked for.
        progress: Observer.
        resolved: What :func:`preflight.check` found, where that was done already.

    Returns:
        What came out; None in every process but the first, when several share the training.

    Raises:
        KdcliError: Anything a user can act on; nothing half-written is left behind.
    """
    resolved = preflight.check(request) if resolved is None else resolved
    if not processes.first():
        return None if request.stage == "evaluate" else _run(request, progress, resolved[0], None)
    with preflight.reserved(request, resolved) as out:
        if request.stage == "evaluate":
            return evaluation.run(request, resolved, out, progress)
        return _run(request, progress, resolved[0], out)


def _run(request: Request, progress: Progress, found: Resolved, out: Path | None) -> Outcome | None:
    """One stage that makes a model; ``out`` is known to the first process."""
    timings = Timings()
    with timings.phase("resolve"):
        source = found.ref
        for note in found.notes:
            progress.note(note)
        device = devices.device_of(request.common.device)
        distributed.start(device)
        out = distributed.of_first(out)
        assert out is not None
        request = preflight.settle_data(request, found.path)
        dataset = preflight.told_data(request, [found.path], progress)
    devices.seed_everything(request.common.seed)
    with timings.phase("load"):
        # A teacher that is larger than the device waits in memory, and is spread when it has to answer.
        home = device if placement.fits(found.path, device) else torch.device("cpu")
        checkpoint = checkpoints.load(found.path, labels=dataset.label_names, device=home)
        if request.dequantize:
            activations.detach(checkpoint.model)
        stage = stage_of(request)
        if not checkpoint.has_head and request.stage != "distill":
            raise InputError(
                f"'{source}' has no classification head",
                "fine-tune it first, or distill from it: kdcli distill --teacher MODEL --student tiny",
            )
        encoded = Splits(dataset, checkpoint, progress)
    context = Context(
        request=request,
        checkpoint=checkpoint,
        dataset=dataset,
        encoded=encoded,
        device=device,
        seed=request.common.seed,
        progress=progress,
        resume_dir=output.resume_directory(out),
    )
    if not processes.first():
        _follow(context, stage)
        return None
    needed = 6 * _weights_bytes(found.path) + (64 << 20)
    with output.building(out, needed) as work:
        report = _live(context, stage, source, work, out, timings)
        common = request.common
        final = output.publish(work, out, force=common.force, named=common.out is not None)
    shutil.rmtree(output.resume_directory(out), ignore_errors=True)
    return Outcome(final, report, [report])


def stage_of(request: Request) -> Stage[Any]:
    """What a stage that makes a model declares."""
    declared: Stage[Any] = importlib.import_module(f"kdcli.stages.{request.stage}.stage").STAGE
    return declared


def _follow(context: Context, stage: Stage[Any]) -> None:
    """What the other processes of a run do: their share of the training, in the same order."""
    plan = stage.prepare(context)
    devices.seed_everything(context.seed)
    stage.apply(context, plan)


def _live(
    context: Context, stage: Stage[Any], source: str, work: Path, out: Path, timings: Timings
) -> Report:
    """Everything between loading and publishing; returns the report that is in ``work``."""
    request, progress = context.request, context.progress
    threads = environment.threads()
    # Before a stage narrows what it trains and chooses on: what is measured stays whole.
    picked = picked_rows.pick(context.dataset, None, request.common.limit)
    read = context.encoded
    split, rows = picked.split, picked.of(read)
    doubts = [*context.checkpoint.doubts, *soundness.probe(context.checkpoint, read[split])]
    doubts += reading.check_reading(context.checkpoint, context.dataset.splits[split], read[split], split)
    doubts += reading.told(context.checkpoint, {split: read[split]})
    with timings.phase("prepare"):
        plan = stage.prepare(context)
    conditions = measurement.Conditions(
        threads=threads,
        device=devices.session_device(context.device),
        batch_sizes=BATCH_SIZES,
        runtimes=("onnx",),
        timings=timings,
        progress=progress,
    )

    progress.phase("measure before")
    export = graphs.of_teacher if request.stage == "distill" else graphs.of_input
    input_graph, warnings = export(
        context.checkpoint, context.encoded[split], threads=threads, timings=timings, progress=progress
    )
    context.input_graph = input_graph
    before = measurement.measure(
        context.checkpoint, input_graph, rows, split, conditions, title="before", rows_sha256=picked.sha256
    )
    if before.measurement.quality is not None:
        gates.check(request.common.gates, before.measurement.quality.metrics)
    given, input_labels = context.checkpoint, list(context.checkpoint.labels)
    first = not given.log.lineage
    history = lineage.lineage_of(given, source, before.measurement)

    progress.phase(request.stage)
    devices.seed_everything(context.seed)
    large = (
        _weights_bytes(context.checkpoint.path) >= mapped.LARGE
    )  # the next step comes on top of what is kept
    if large:
        memory.give_back()
    with timings.phase("apply"):
        applied = stage.apply(context, plan)
    with timings.phase("save"):
        entry = LineageEntry(
            stage=request.stage,
            method=applied.method.name,
            report_sha256=None,
            model=source,
            metric=None,
            value=None,
            params=applied.method.params,
            chosen=lineage.chosen(request, applied.method.detail),
            chosen_on=picked_rows.pick(context.dataset, "validation", None).sha256,
        )
        applied.checkpoint.log.lineage = [e.model_dump(mode="json") for e in (*history, entry)]
        checkpoints.save(applied.checkpoint, work, integers=applied.integers, half=applied.half)
    for used in (given, applied.checkpoint):
        # Its weights are on the disk: from here on only its tokenizer is needed, and its graph where it has one.
        if used.placed is None and not (used is given and input_graph is None):
            used.model.to("meta")
    if large:
        memory.give_back()
    with timings.phase("reload"):
        after_model = checkpoints.load(work, device=context.device, in_file=True)
    after_encoded, after_rows = context.encoded[split], rows
    if after_model.labels == input_labels and (
        after_model.tokenizer.get_vocab() == given.tokenizer.get_vocab()
    ):
        reading.check_written(given, after_model, context.dataset.splits[split], read[split])
    else:
        with timings.phase("data"):  # what ships reads the texts in its own tokens, and counts its own labels
            own = Splits(context.dataset, after_model)
            after_encoded, after_rows = own[split], picked.of(own)

    progress.phase("export")
    graph = graphs.build(
        after_model,
        work / graphs.FILE,
        after_encoded,
        threads=threads,
        timings=timings,
        progress=progress,
        rewrite=applied.rewrite_onnx,
        attention=applied.fusion,
        exact=applied.exact,
        properties={"stage": request.stage, "lineage": " > ".join(e.stage for e in (*history, entry))},
    )
    progress.phase("measure after")
    after = measurement.measure(
        after_model, graph.path, after_rows, split, conditions, title="after", rows_sha256=picked.sha256
    )
    progress.phase("measure latency")
    measurement.time_together(
        [
            measurement.Timed(given, input_graph, rows, before),
            measurement.Timed(after_model, graph.path, after_rows, after),
        ],
        conditions,
    )
    if first:  # the input's latencies are known only now
        history[0].params = {"measurement": before.measurement.model_dump(mode="json")}
        after_model.log.lineage = [e.model_dump(mode="json") for e in (*history, entry)]
        transforms.write_log(after_model.log, work)

    with timings.phase("report"):
        # Both in the labels of what comes out: the input may have them in another order.
        order = [input_labels.index(name) for name in after_model.labels]
        assert rows.labels is not None
        assert after_rows.labels is not None
        delta = comparison.row_by_row(
            comparison.compare(before.measurement, after.measurement),
            after_model.task.compare(before.logits[:, order], after.logits, after_rows.labels),
        )
        entry = entry.model_copy(update=lineage.outcome_of(after.measurement))
        method = applied.method.model_copy(update={"detail": applied.method.detail | {"onnx": graph.detail}})
        warnings = [
            *doubts,
            *warnings,
            *report_of.of_data(context.dataset),
            *applied.warnings,
            *graph.warnings,
            *comparison.honest(delta, before.measurement, after.measurement),
            *given.task.doubts(before.logits, rows.labels, input_labels, of_input=True),
            *after_model.task.doubts(after.logits, after_rows.labels, after_model.labels),
            *lineage.selected([*history, entry], split, picked.split_sha256),
        ]
        judged = gates.judge(request.common.gates, before.measurement, after.measurement, delta)
        report = report_of.build(
            request,
            source,
            after_model,
            context.dataset,
            out,
            Judged(
                before=before.measurement,
                after=after.measurement,
                delta=delta,
                gates=judged,
                lineage=[*history, entry],
                warnings=warnings,
                method=method,
                parity=graph.parity,
            ),
            device=str(context.device),
        )
        return report_of.finish(report, after_model.task, work, timings)


def _weights_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))
