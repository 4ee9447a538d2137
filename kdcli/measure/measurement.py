"""Measure one model the same way before and after: quality, size, compute, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from kdcli import cache
from kdcli.export import classifier, files, own_graph, sessions
from kdcli.inputs import batching, text
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.text import Encoded
from kdcli.measure import compute, latency, size
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.report.io import sha256_of
from kdcli.report.schema import Compute, Files, Measurement, Quality
from kdcli.tasks.task import Task
from kdcli.timing import Timings

LATENCY_ROWS = 128
ROUNDS = 3
_ROUND: dict[str, Any] = {"warmup": 5, "min_runs": 12, "max_runs": 150, "max_seconds": 1.0}
_SEED = 0  # of the rows that are timed: the same for every model of a data set


@dataclass(frozen=True)
class Conditions:
    """What two measurements must share to be compared."""

    threads: int  # for every session
    device: str  # cpu or cuda[:N]
    batch_sizes: Sequence[int]  # to time
    runtimes: Sequence[str]  # onnx, torch or both; quality comes from the first
    timings: Timings  # gets the phases quality, size, compute and latency
    progress: Progress


@dataclass
class Measured:
    """A measurement and the logits (N, C) behind it, for comparing two models row by row."""

    measurement: Measurement
    logits: np.ndarray


def dynamic_integers(graph: Path) -> bool:
    """Whether the graph rounds activations at run time, so that a row's answer depends on its batch."""
    operators = {node.op_type for node in files.outline(graph).graph.node}
    return bool(
        operators & {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QAttention", "MatMulIntegerToFloat"}
    )


def logits_of(
    graph: Path,
    encoded: Encoded,
    pad_id: int,
    *,
    labels: int,
    task: Task,
    threads: int,
    device: str,
    progress: Progress,
    title: str,
) -> np.ndarray:
    """Logits (N, C) of an ONNX file for every row, where C is ``labels``; remembered by content.

    Rows share a batch only with rows of the same length, so padding cannot matter; an integer graph
    with dynamic activation scales sees every row alone, as a service that answers single requests does.
    """
    name = cache.key(
        graph=[sha256_of(file) for file in (graph, *files.beside(graph))],
        rows=text.fingerprint(Encoded(encoded.ids, encoded.type_ids, encoded.offsets, None)),
        onnxruntime=onnxruntime.__version__,
        code=cache.code(),
        device=device,
        threads=threads,
        task=task.name,
        cpu=_cpu(),
        activation=task.about(labels).get("activation"),
    )
    path = cache.entry("predictions", f"{name}.npy")
    if (known := cache.load_array(path, shape=(len(encoded), labels))) is not None:
        return known
    size = 1 if dynamic_integers(graph) else 32
    groups = batching.equal_length_batches(encoded.lengths, size)
    logits: np.ndarray | None = None
    running = classifier.running(graph, threads=threads, device=device, labels=labels, task=task)
    with running as run, progress.task(title, len(encoded)) as counted:
        for rows in groups:
            part = run(batching.collate(encoded, rows, pad_id))
            if logits is None:
                logits = np.empty((len(encoded), part.shape[1]), dtype=np.float32)
            logits[rows] = part
            counted.advance(len(rows))
    assert logits is not None
    cache.save_array(path, logits)
    return logits


def measure(
    checkpoint: Checkpoint,
    graph: Path | None,
    encoded: Encoded,
    split: str,
    conditions: Conditions,
    *,
    title: str,
    rows_sha256: str | None = None,
    weights: bool = True,
) -> Measured:
    """Measure a checkpoint and its ONNX file on one split; latency comes from :func:`time_together`.

    Args:
        checkpoint: Loaded from the directory whose size is meant.
        graph: Its ONNX form, which gives the quality, because it is what ships; None where it has none and torch
            gives it.
        encoded: Labelled rows.
        split: Their name.
        conditions: The same for every model that is compared.
        title: ``before`` or ``after``, for people.
        rows_sha256: Of the rows (:class:`kdcli.inputs.picked.Picked`), for comparing with another run.
        weights: False: the graph is judged alone, because there is no checkpoint that belongs to it.
    """
    threads, device = conditions.threads, conditions.device
    timings, progress, runtimes = conditions.timings, conditions.progress, conditions.runtimes
    with timings.phase("quality"):
        judged = graph if runtimes[0] == "onnx" else None
        logits = _logits(checkpoint, judged, encoded, threads, device, progress, title)
        assert encoded.labels is not None
        values = checkpoint.task.measure(logits, encoded.labels, split, encoded.queries)
        found = Quality.of(checkpoint.task.primary, values, rows_sha256)
    parameters = nonzero = None
    if weights:
        tensors = list(checkpoint.model.parameters())
        parameters = sum(t.numel() for t in tensors)
        nonzero = sum(int((t != 0).sum()) for t in tensors)
    with timings.phase("size"):
        beside = [] if graph is None else files.beside(graph)
        sizes = size.measure(checkpoint.path, parameters, nonzero, graph, beside)
    with timings.phase("compute"):
        tokens = max(2, round(float(encoded.lengths.mean())))
        counted = Compute(macs=compute.macs(checkpoint.model, tokens) if weights else None, sequence=tokens)
    stored = sorted(file.name for file in checkpoint.path.glob("*.safetensors")) if weights else []
    used = Files(
        graph=None if graph is None else own_graph.named(checkpoint, graph),
        graph_sha256=None if graph is None else sha256_of(graph),
        quality="torch" if judged is None else "onnx",
        weights=stored,
    )
    return Measured(Measurement(quality=found, size=sizes, compute=counted, latency=[], files=used), logits)


def decided(
    checkpoint: Checkpoint,
    encoded: Encoded,
    progress: Progress,
    *,
    graph: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> Task:
    """The checkpoint's task with what these rows decide of it; those without a label have no say.

    Args:
        checkpoint: A model with a head.
        encoded: Rows of a validation split.
        progress: Observer.
        graph: Its ONNX form, whose answers decide where there is one; None: torch's.
        device: ``cpu`` or ``cuda[:N]``, of the graph.
        threads: Of the graph's session.
    """
    if not checkpoint.task.decides:
        return checkpoint.task
    assert encoded.labels is not None
    known = checkpoint.task.known(encoded.labels)
    rows = encoded if known.all() else encoded.take(np.flatnonzero(known))
    assert rows.labels is not None
    logits = _logits(checkpoint, graph, rows, threads, device, progress, "validation")
    return checkpoint.task.fitted(logits, rows.labels)


@dataclass(frozen=True)
class Timed:
    """A model to be timed; its measurement gets the latencies."""

    checkpoint: Checkpoint
    graph: Path | None  # None: it has none, and is timed in torch
    encoded: Encoded
    measured: Measured

    def runtimes(self, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted runtimes that can run it."""
        return [name for name in wanted if name == "torch" or self.graph is not None] or ["torch"]


def time_together(models: Sequence[Timed], conditions: Conditions) -> None:
    """Time all models in turns, round after round, so that a slow minute of the machine is nobody's alone.

    One session is open at a time: the waiting threads of another would slow it.
    """
    threads, sizes = conditions.threads, conditions.batch_sizes
    found: dict[tuple[int, str, int], list[latency.Samples]] = {}
    with conditions.timings.phase("latency"):
        for _ in range(ROUNDS):
            for number, one in enumerate(models):
                for runtime in one.runtimes(conditions.runtimes):
                    with _running(one, runtime, conditions) as run:
                        for batch_size in sizes:
                            batches = latency_batches(one.encoded, one.checkpoint.pad_id, batch_size)
                            samples = latency.collect(run, batches, **_ROUND)
                            found.setdefault((number, runtime, batch_size), []).append(samples)
    for number, one in enumerate(models):
        one.measured.measurement.latency = [
            latency.summarise(found[number, runtime, batch_size], runtime=runtime, threads=threads)
            for runtime in one.runtimes(conditions.runtimes)
            for batch_size in sizes
        ]


def _running(
    one: Timed, runtime: str, conditions: Conditions
) -> AbstractContextManager[Callable[[Mapping[str, np.ndarray]], np.ndarray]]:
    if runtime == "torch" or one.graph is None:
        return nullcontext(torch_runner(one.checkpoint))
    return classifier.running(
        one.graph, threads=conditions.threads, device=conditions.device, task=one.checkpoint.task
    )


def latency_batches(encoded: Encoded, pad_id: int, size: int) -> list[dict[str, np.ndarray]]:
    """Random rows in batches of ``size``, padded to their own longest, as a service would meet them."""
    rng = np.random.default_rng(_SEED)
    count = max(1, min(LATENCY_ROWS, 4 * LATENCY_ROWS // size))
    picks = rng.integers(0, len(encoded), (count, size))
    return [batching.collate(encoded, rows, pad_id) for rows in picks]


def _logits(
    checkpoint: Checkpoint,
    graph: Path | None,
    rows: Encoded,
    threads: int,
    device: str,
    progress: Progress,
    title: str,
) -> np.ndarray:
    """Logits (N, C) of a checkpoint's graph; of the checkpoint itself, by torch, where it has none."""
    if graph is None:
        return _torch_logits(checkpoint, rows, progress, title)
    return logits_of(
        graph,
        rows,
        checkpoint.pad_id,
        labels=len(checkpoint.labels),
        task=checkpoint.task,
        threads=threads,
        device=device,
        progress=progress,
        title=title,
    )


def _torch_logits(checkpoint: Checkpoint, encoded: Encoded, progress: Progress, title: str) -> np.ndarray:
    run = torch_runner(checkpoint)
    groups = batching.equal_length_batches(encoded.lengths, 32)
    with progress.task(title, len(groups)) as task:

        def batches() -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
            made = []
            for rows in groups:
                made.append((rows, batching.collate(encoded, rows, checkpoint.pad_id)))
                task.advance()
            return made

        return sessions.predict(run, batches())


def _cpu() -> str:
    from kdcli.measure.environment import isa

    return ",".join(isa())
