"""Answers of a model to texts, part by part, as ``evaluate`` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from kdcli import devices, interrupts, tasks
from kdcli.data.tables import Located
from kdcli.errors import InputError
from kdcli.export import classifier, own_graph, sessions
from kdcli.export import graph as graphs
from kdcli.inputs import batching, kinds
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.text import Encoded
from kdcli.measure import environment, measurement
from kdcli.models import foreign
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.references import Resolved
from kdcli.progress import Progress
from kdcli.tasks.task import Kind, check_finite
from kdcli.timing import Timings

Answer = dict[str, object]


@dataclass(frozen=True)
class PredictOptions:
    """How a model is run and what of its answers is wanted."""

    batch_size: int = 32
    top: int | None = None  # labels with a score, best first; None: as the task has it
    torch: bool = False  # run the checkpoint, and not its ONNX graph
    device: str = "auto"


def answers(
    found: Resolved, read: Callable[[Kind], Iterator[Located]], how: PredictOptions, progress: Progress
) -> Iterator[list[Answer]]:
    """Answer texts in their order; the first answers come before the last texts are read.

    Rows share a batch only with rows of the same length, and an integer graph with dynamic activation scales sees every
    row alone: an answer does not depend on which rows stand beside it.

    Args:
        found: The model: judged by its own graph where it has one, else by an export of it, which is kept in the cache.
        read: Gives the texts for answers of a kind.
        how: How it is run.
        progress: Is told what is out of the ordinary.

    Yields:
        One JSON object a row, as the task of the model has it.

    Raises:
        InputError: The model has no head or is broken, or a row has no text; names its line.
    """
    texts = read(_kind(found.path))
    first = next(texts, None)  # what is wrong with it is said before the model is loaded
    if first is None:
        return
    device = devices.device_of(how.device)
    loaded = own_graph.load(found, device=device)
    checkpoint, graph = loaded.checkpoint, loaded.graph
    if not checkpoint.has_head:
        raise InputError(f"'{found.ref}' has no head for a task, so it has no answers to give")
    own_graph.check(loaded, ("torch" if how.torch else "onnx",))
    for warning in (*checkpoint.doubts, *loaded.warnings):
        progress.warn(warning.message)
    checkpoint.task.answer(np.zeros((0, len(checkpoint.labels))), checkpoint.labels, how.top)  # refuses a top
    threads, cut = environment.threads(), 0
    encoded = _encoded(checkpoint, first)
    if graph is None and not how.torch:
        progress.note(
            f"'{found.ref}' has no ONNX graph of its own: it is exported once and kept in the cache"
        )
        graph, told = graphs.of_teacher(
            checkpoint, encoded, threads=threads, timings=Timings(), progress=progress
        )
        for warning in told:
            progress.warn(warning.message)
    running = (
        _torch(checkpoint, how) if graph is None or how.torch else _onnx(checkpoint, graph, how, threads)
    )
    with running as run:
        for part in chain([first], texts):
            interrupts.check()
            encoded = _encoded(checkpoint, part)
            cut += encoded.cut
            logits = run(encoded)
            check_finite(logits, part.source)
            yield checkpoint.task.answer(logits, checkpoint.labels, how.top)
    if cut:
        progress.note(f"{cut} rows are longer than {checkpoint.max_length} tokens: they were cut there")


def _kind(path: Path) -> Kind:
    """Of the answers of a model, before it is loaded."""
    name = foreign.task_of(path)
    return "one-of" if name is None else tasks.kind_of(name)


def _encoded(checkpoint: Checkpoint, part: Located) -> Encoded:
    inputs = kinds.of(checkpoint.tokenizer.model_input_names)
    return inputs.encode(
        part.rows,
        checkpoint.tokenizer,
        checkpoint.max_length,
        None,
        part.source,
        kind=checkpoint.task.kind,
        outputs=len(checkpoint.labels),
        place=part.place,
    )


@contextmanager
def _onnx(
    checkpoint: Checkpoint, graph: Path, how: PredictOptions, threads: int
) -> Iterator[Callable[[Encoded], np.ndarray]]:
    size = 1 if measurement.dynamic_integers(graph) else how.batch_size
    device = devices.session_device(checkpoint.device)
    running = classifier.running(
        graph, threads=threads, device=device, labels=len(checkpoint.labels), task=checkpoint.task
    )
    with running as run:
        yield lambda encoded: _logits(run, encoded, checkpoint.pad_id, size)


@contextmanager
def _torch(checkpoint: Checkpoint, how: PredictOptions) -> Iterator[Callable[[Encoded], np.ndarray]]:
    size = 1 if checkpoint.log.quantised is not None else how.batch_size
    yield lambda encoded: _logits(torch_runner(checkpoint), encoded, checkpoint.pad_id, size)


def _logits(
    run: Callable[[batching.Arrays], np.ndarray], encoded: Encoded, pad_id: int, size: int
) -> np.ndarray:
    """(N, C), in the order of the rows."""
    groups = batching.equal_length_batches(encoded.lengths, size)
    return sessions.predict(run, [(rows, batching.collate(encoded, rows, pad_id)) for rows in groups])
