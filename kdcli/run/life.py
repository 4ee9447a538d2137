"""The one life of a stage.

resolve -> check the chain -> data -> load -> seed, device -> measure before -> apply -> save ->
reload from disk -> export -> parity -> measure after -> gates -> report -> rename.
"""

from __future__ import annotations

import importlib
import shutil
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcli import devices, memory, processes, tasks
from kdcli.context import Applied, Context, Stage
from kdcli.errors import InputError
from kdcli.export import graph as graphs
from kdcli.inputs import picked as picked_rows
from kdcli.inputs import reading
from kdcli.inputs.splits import Splits
from kdcli.inputs.text import Encoded
from kdcli.measure import comparison, environment, measurement
from kdcli.models import activations, mapped, placement, transforms
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.references import Resolved
from kdcli.probe import soundness
from kdcli.progress import Progress
from kdcli.report import gates
from kdcli.report.schema import LineageEntry, Report, Warning_
from kdcli.request import Request
from kdcli.run import evaluation, lineage, output, preflight, report_of
from kdcli.run.outcome import Outcome
from kdcli.run.report_of import Judged
from kdcli.tasks.task import Task
from kdcli.timing import Timings
from kdcli.training import distributed

BATCH_SIZES = (1, 32)
SCORE = "score"  # the name of a new head's output where the data have no names


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
        checkpoint = checkpoints.load(
            found.path,
            labels=dataset.label_names or [SCORE],
            task=tasks.of_kind(dataset.kind),
            device=home,
        )
        checkpoint.task = tasks.judged_by(checkpoint.task, request.common.metric)
        if request.dequantize:
            activations.detach(checkpoint.model)
        stage = stage_of(request)
        if not checkpoint.has_head and request.stage != "distill":
            raise InputError(
                f"'{source}' has no head for a task",
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
    life = _Life(context, stage, source, work, timings)
    life.measure_before()
    applied = life.apply()
    life.reload(applied)
    life.export(applied)
    life.measure_after()
    with timings.phase("report"):
        return report_of.finish(life.report(applied, out), life.after.checkpoint.task, work, timings)


class _Life:
    """The steps of one stage that makes a model, each of them once and in this order."""

    before: measurement.Timed
    after: measurement.Timed
    graph: graphs.Graph
    entry: LineageEntry

    def __init__(
        self, context: Context, stage: Stage[Any], source: str, work: Path, timings: Timings
    ) -> None:
        self.context, self.stage, self.source = context, stage, source
        self.work, self.timings, self.progress = work, timings, context.progress
        self.conditions = measurement.Conditions(
            threads=environment.threads(),
            device=devices.session_device(context.device),
            batch_sizes=BATCH_SIZES,
            runtimes=("onnx",),
            timings=timings,
            progress=context.progress,
        )
        # Before a stage narrows what it trains and chooses on: what is measured stays whole.
        self.picked = picked_rows.pick(context.dataset, None, context.request.common.limit)
        self.read, self.split = context.encoded, self.picked.split
        self.rows = self.picked.of(self.read)
        self.warnings: list[Warning_] = []

    def measure_before(self) -> None:
        """Prove that the input is run as its owner runs it, prepare the stage, and measure the input."""
        context, split = self.context, self.split
        given, encoded = context.checkpoint, self.read[split]
        self.warnings += [*given.doubts, *soundness.probe(given, encoded)]
        self.warnings += reading.check_reading(given, context.dataset.splits[split], encoded, split)
        self.warnings += reading.told(given, {split: encoded})
        with self.timings.phase("prepare"):
            self.plan = self.stage.prepare(context)
        self.progress.phase("measure before")
        export = graphs.of_teacher if context.request.stage == "distill" else graphs.of_input
        graph, told = export(
            context.checkpoint,
            context.encoded[split],
            threads=self.conditions.threads,
            timings=self.timings,
            progress=self.progress,
        )
        context.input_graph = graph
        self.warnings += told
        self.before = self._measured(context.checkpoint, graph, self.rows, "before")
        if (quality := self.before.measured.measurement.quality) is not None:
            # A gate on what is no metric of this task is told before any work.
            gates.check(context.request.common.gates, quality.metrics)
        self.labels = list(context.checkpoint.labels)
        self.first = not context.checkpoint.log.lineage
        self.history = lineage.lineage_of(context.checkpoint, self.source, self.before.measured.measurement)

    def apply(self) -> Applied:
        """Let the stage work, and save what it made."""
        context, given = self.context, self.before.checkpoint
        self.progress.phase(context.request.stage)
        devices.seed_everything(context.seed)
        # The next step comes on top of what is kept.
        large = _weights_bytes(given.path) >= mapped.LARGE
        if large:
            memory.give_back()
        with self.timings.phase("apply"):
            applied = self.stage.apply(context, self.plan)
        with self.timings.phase("save"):
            self.entry = LineageEntry(
                stage=context.request.stage,
                method=applied.method.name,
                report_sha256=None,
                model=self.source,
                metric=None,
                value=None,
                params=applied.method.params,
                chosen=self.stage.chosen(context.request, applied.method.detail),
                chosen_on=picked_rows.pick(context.dataset, "validation", None).sha256,
            )
            applied.checkpoint.log.lineage = self._lineage()
            checkpoints.save(applied.checkpoint, self.work, integers=applied.integers, half=applied.half)
        for used in (given, applied.checkpoint):
            # Its weights are on the disk: from here on only its tokenizer is needed, and its graph where it has one.
            if used.placed is None and not (used is given and self.before.graph is None):
                used.model.to("meta")
        if large:
            memory.give_back()
        return applied

    def reload(self, applied: Applied) -> None:
        """Load what was saved, as whoever gets it will, and let validation rows decide what its task leaves open."""
        context, split, given = self.context, self.split, self.before.checkpoint
        with self.timings.phase("reload"):
            made = checkpoints.load(self.work, device=context.device, in_file=True)
        self.made, self.made_rows, self.made_read = made, self.rows, context.encoded[split]
        encoded: Mapping[str, Encoded] = context.encoded
        if made.labels == self.labels and made.tokenizer.get_vocab() == given.tokenizer.get_vocab():
            reading.check_written(given, made, context.dataset.splits[split], self.read[split])
        else:
            # What ships reads texts in its own tokens, and counts its own labels.
            with self.timings.phase("data"):
                encoded = Splits(context.dataset, made)
                self.made_read, self.made_rows = encoded[split], self.picked.of(encoded)
                if context.deciding is not None:
                    few = encoded["validation"].take(context.deciding)
                    encoded = ChainMap({"validation": few}, encoded)  # type: ignore[arg-type]
        if made.task.decides and self._decides(applied):
            with self.timings.phase("quality"):
                made.task = measurement.decided(made, encoded["validation"], self.progress)
            checkpoints.rewrite_task(made, self.work)

    def _decides(self, applied: Applied) -> bool:
        """A student decides anew; a model that was changed only where the input has decided, too."""
        return self.context.request.stage == "distill" or self.before.checkpoint.task.decided

    def _decided_alike(self) -> Task | None:
        """The input's task, had the rows that decided for the output decided for it, too; None where they have."""
        given = self.before.checkpoint
        if given.task.decided or not self.made.task.decided:
            return None
        return measurement.decided(
            given,
            self.context.encoded["validation"],
            self.progress,
            graph=self.before.graph,
            device=self.conditions.device,
            threads=self.conditions.threads,
        )

    def export(self, applied: Applied) -> None:
        """Write the graph that ships."""
        self.progress.phase("export")
        stages = " > ".join(entry.stage for entry in (*self.history, self.entry))
        self.graph = graphs.build(
            self.made,
            self.work / graphs.FILE,
            self.made_read,
            threads=self.conditions.threads,
            timings=self.timings,
            progress=self.progress,
            rewrite=applied.rewrite_onnx,
            attention=applied.fusion,
            exact=applied.exact,
            properties={"stage": self.context.request.stage, "lineage": stages},
        )

    def measure_after(self) -> None:
        """Measure what ships, and time both models in turns."""
        self.progress.phase("measure after")
        self.after = self._measured(self.made, self.graph.path, self.made_rows, "after")
        self.progress.phase("measure latency")
        measurement.time_together([self.before, self.after], self.conditions)
        if self.first:  # the input's latencies are known only now
            whole = self.before.measured.measurement.model_dump(mode="json")
            self.history[0].params = {"measurement": whole}
            self.made.log.lineage = self._lineage()
            transforms.write_log(self.made.log, self.work)

    def report(self, applied: Applied, out: Path) -> Report:
        """Compare, judge and tell."""
        request, before, after = self.context.request, self.before.measured, self.after.measured
        given, made = self.before.checkpoint, self.made
        delta = comparison.of_two(self.before, self.after, self.labels)
        entry = self.entry.model_copy(update=lineage.outcome_of(after.measurement))
        detail = applied.method.detail | {"onnx": self.graph.detail}
        assert self.rows.labels is not None
        assert self.made_rows.labels is not None
        warnings = [
            *self.warnings,
            *report_of.of_data(self.context.dataset),
            *applied.warnings,
            *self.graph.warnings,
            *comparison.honest(delta, before.measurement, after.measurement),
            *comparison.set_apart(self.before, self.after, self._decided_alike()),
            *given.task.doubts(before.logits, self.rows.labels, self.labels, of_input=True),
            *made.task.doubts(after.logits, self.made_rows.labels, made.labels),
            *lineage.selected([*self.history, entry], self.split, self.picked.split_sha256),
        ]
        return report_of.build(
            request,
            self.source,
            made,
            self.context.dataset,
            out,
            Judged(
                before=before.measurement,
                after=after.measurement,
                delta=delta,
                gates=gates.judge(request.common.gates, before.measurement, after.measurement, delta),
                lineage=[*self.history, entry],
                warnings=warnings,
                method=applied.method.model_copy(update={"detail": detail}),
                parity=self.graph.parity,
            ),
            device=str(self.context.device),
        )

    def _measured(
        self, checkpoint: Checkpoint, graph: Path | None, rows: Encoded, title: str
    ) -> measurement.Timed:
        found = measurement.measure(
            checkpoint,
            graph,
            rows,
            self.split,
            self.conditions,
            title=title,
            rows_sha256=self.picked.sha256,
        )
        return measurement.Timed(checkpoint, graph, rows, found)

    def _lineage(self) -> list[dict[str, Any]]:
        return [one.model_dump(mode="json") for one in (*self.history, self.entry)]


def _weights_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))
