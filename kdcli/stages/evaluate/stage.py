"""Evaluate: measure models on the same rows and compare them, change nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from kdcli import devices, tasks
from kdcli.data.sources import Dataset
from kdcli.errors import InputError
from kdcli.export import files, own_graph
from kdcli.export import graph as graphs
from kdcli.inputs import picked as picked_rows
from kdcli.inputs import reading, splits
from kdcli.measure import comparison, environment, measurement
from kdcli.models import graph_only, safety, tokenizers
from kdcli.models.checkpoint import Checkpoint, quiet
from kdcli.models.references import Resolved
from kdcli.names import printable
from kdcli.probe import soundness
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.report.schema import Delta, LineageEntry, Measurement, Warning_
from kdcli.request import Request
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.timing import Timings

_OF_GRAPH = "quality and size here are those of the graph"
_OF_TORCH = "quality here is that of the checkpoint, size that of the graph"
RUNTIMES = {"onnx": ("onnx",), "torch": ("torch",), "both": ("onnx", "torch")}


@dataclass
class EvaluatedModel:
    """A model that is judged, measured."""

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


def measure(
    request: Request,
    options: EvaluateOptions,
    found: Resolved,
    dataset: Dataset,
    picked: picked_rows.Picked,
    timings: Timings,
    progress: Progress,
) -> EvaluatedModel:
    """Load one model and measure its quality on the rows; its latency comes later, together with the others'.

    Raises:
        InputError: The model has no head, or its files contradict each other.
    """
    device = devices.device_of(request.common.device)
    devices.seed_everything(request.common.seed)
    conditions = conditions_of(request, options, timings, progress)
    with timings.phase("load"):
        loaded = own_graph.load(found, device=device)
        checkpoint, warnings = loaded.checkpoint, list(loaded.warnings)
        checkpoint.task = tasks.judged_by(checkpoint.task, request.common.metric)
        if not checkpoint.has_head:
            raise InputError(f"'{found.ref}' has no head for a task, so there is nothing to evaluate")
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
    return EvaluatedModel(found.ref, checkpoint, timed, warnings, agreed)


def check_ids(judges: list[EvaluatedModel]) -> None:
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


def conditions_of(
    request: Request, options: EvaluateOptions, timings: Timings, progress: Progress
) -> measurement.Conditions:
    """What all models of the run share."""
    return measurement.Conditions(
        threads=environment.threads(),
        device=devices.session_device(devices.device_of(request.common.device)),
        batch_sizes=options.batch_sizes,
        runtimes=RUNTIMES[options.runtime],
        timings=timings,
        progress=progress,
    )


@dataclass
class Against:
    """What a model is compared with, and what came of it."""

    delta: Delta
    before: Measurement | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # gate -> why it has no value
    warnings: list[Warning_] = field(default_factory=list)


def compare(one: EvaluatedModel, baseline: EvaluatedModel | None, lineage: list[LineageEntry]) -> Against:
    """Compare a model with the baseline, or without one with the first model of its lineage as its report recorded it.

    Args:
        one: The model.
        baseline: Measured in the same run.
        lineage: Of the model, oldest first.
    """
    after = one.measured.measurement
    found = Against(comparison.compare(None, after))
    if baseline is not None:
        found.before = baseline.measured.measurement
        found.delta = comparison.of_two(baseline.timed, one.timed, baseline.checkpoint.labels)
        found.warnings += comparison.set_apart(baseline.timed, one.timed)
    elif len(one.checkpoint.log.lineage) > 1 and (recorded := io.recorded(lineage[0])) is not None:
        found.before = comparison.from_record(recorded, after)
        found.delta = comparison.compare(found.before, after)
        found.warnings, found.reasons = comparison.of_record(recorded, found.before, lineage[0].model)
    found.warnings += comparison.honest(found.delta, found.before, after)
    return found


def bytes_of(one: EvaluatedModel) -> int:
    """What :func:`copy` writes, about."""
    assert one.graph is not None
    return sum(path.stat().st_size for path in (*_copied(one), one.graph, *files.beside(one.graph)))


def copy(one: EvaluatedModel, work: Path) -> None:
    """Copy a model unchanged, with the graph that was judged.

    Where plain transformers, which the card has people call, would make another tokenizer out of the copy, its settings
    name the class that reads it rightly.
    """
    source, tokenizer = one.checkpoint.path, one.checkpoint.tokenizer
    assert one.graph is not None
    for path in _copied(one):
        shutil.copyfile(path, work / path.name)
    shutil.copyfile(one.graph, work / own_graph.FILE)
    for path in files.beside(one.graph):
        place = work / path.relative_to(one.graph.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    with quiet():
        if not tokenizers.plainly_alike(tokenizer, work, tokenizer.padding_side):
            tokenizers.save(tokenizer, source, work, max_length=one.checkpoint.max_length)


def _copied(one: EvaluatedModel) -> list[Path]:
    return [path for path in sorted(one.checkpoint.path.iterdir()) if path.is_file() and _belongs(path)]


def _belongs(path: Path) -> bool:
    """Whether a file is copied with a model: not what is written anew, no graph but the judged one, no pickle."""
    name = path.name
    return (
        name not in ("report.json", "README.md") and ".onnx" not in name and path.suffix not in safety.PICKLES
    )
