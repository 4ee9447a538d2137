"""Milliseconds of a layer of any shape on this machine, measured on a small ONNX graph of nothing else.

A layer alone is over too fast to be timed, and its weights would stay in the processor's cache, which those of
a whole model do not. So the graph is a stack of copies, as many as the model has layers, between a small
embedding and the model's own head, exported and fused as the model itself will be.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from kdcli import cache, families
from kdcli.export import fusion, onnx, sessions
from kdcli.families.family import Encoder
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.inputs.batching import Arrays
from kdcli.inputs.feeding import accepted
from kdcli.inputs.text import TEXT
from kdcli.measure import environment
from kdcli.progress import Progress

Change = Callable[[Layer], None]
Timer = Callable[[Sequence[nn.Module], int, Progress], list[float]]
"""(stacks, tokens of the one row that is run, observer) -> milliseconds of each."""

ROUNDS = 5
_ROUND_MS = 500.0  # of one graph, about
_FEWEST, _MOST, _WARM = 12, 64, 5  # runs
_WORDS = 4  # rows of the small embedding besides those up to the padding


def stack(
    model: nn.Module, family: Encoder, sources: Sequence[int], change: Change | None = None
) -> nn.Module:
    """A copy of ``model`` with other encoder layers, each of them a copy of one that it has.

    Args:
        model: Not changed.
        family: Its family.
        sources: For every layer of the stack the one that is copied. To be exported, one needs a head.
        change: Applied to each copy, which knows its place: cuts heads, for example.
    """
    table: Any = model
    words = table.get_input_embeddings()
    keep = {id(words): nn.Embedding(_pad(model) + 1 + _WORDS, words.embedding_dim, padding_idx=_pad(model))}
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    # Copied without the whole table and the other layers, which can be hundreds of megabytes.
    copies = nn.ModuleList([copy.deepcopy(layers[source]) for source in sources])
    small: Any = copy.deepcopy(model, {**keep, id(layers): copies})
    small.eval().requires_grad_(False)
    if change is not None:
        for one in encoder_layers(small, family):
            change(one)
    return small


def milliseconds(
    kind: str,
    stacks: Mapping[str, Callable[[], nn.Module]],
    tokens: int,
    *,
    progress: Progress,
    threads: int,
    device: str = "cpu",
    timer: Timer | None = None,
) -> dict[str, float]:
    """Time stacks of layers at batch 1, or take their times from the cache.

    All of them are timed in turns, so their differences mean something also on a busy machine; they are cached
    together for that reason.

    Args:
        kind: Of model, and its sizes that the names do not say.
        stacks: Name that says the layer's shape -> makes the stack; called only when it is timed.
        tokens: Length of the row that is run.
        progress: Observer.
        threads: That the runtime may use.
        device: ``cpu`` or ``cuda[:N]``.
        timer: Replaces onnxruntime.

    Returns:
        Milliseconds of each whole stack.
    """
    name = cache.key(
        kind=kind,
        stacks=list(stacks),
        tokens=tokens,
        threads=threads,
        device=device,
        cpu=[environment.cpu_name(), *environment.isa()],
        versions=[cache.code(), onnxruntime.__version__, torch.__version__],
    )
    path = cache.entry("latency", f"{name}.json")
    if (known := cache.load_json(path)) is not None:
        return dict(known)
    run = timer or _by_onnxruntime(threads, device)
    found = dict(zip(stacks, run([make() for make in stacks.values()], tokens, progress), strict=True))
    cache.save_json(path, found)
    return found


def in_turns(
    graphs: Sequence[Path],
    batches: Sequence[Arrays],
    *,
    threads: int,
    device: str,
    rounds: int,
    progress: Progress,
) -> np.ndarray:
    """Milliseconds (R, G, B) of each of G graphs on each of B batches, in each of R rounds.

    Args:
        graphs: ONNX files.
        batches: As many of them as fit into half a second a round are timed, B.
        threads: That the runtime may use.
        device: ``cpu`` or ``cuda[:N]``.
        rounds: How often all graphs take their turn, R.
        progress: Observer.
    """
    found = np.empty((rounds, len(graphs), 0))
    with progress.task("latencies", (rounds + 1) * len(graphs)) as task:
        for number in range(rounds + 1):  # the first one warms up and finds out how long the others are
            times = []
            for graph in graphs:
                # One session is open at a time: the waiting threads of another would slow it.
                with sessions.running(graph, threads=threads, device=device) as run:
                    times.append(_times(run, [batches[0]] * _WARM + list(batches))[_WARM:])
                task.advance()
            if number == 0:
                slowest = max(float(np.median(row)) for row in times)
                batches = batches[: max(_FEWEST, int(_ROUND_MS / slowest))]
                found = np.empty((rounds, len(graphs), len(batches)))
            else:
                found[number - 1] = times
    return found


def _times(run: Callable[[Arrays], object], batches: Sequence[Arrays]) -> list[float]:
    made = []
    for batch in batches:
        started = time.perf_counter_ns()
        run(batch)
        made.append((time.perf_counter_ns() - started) / 1e6)
    return made


def _by_onnxruntime(threads: int, device: str) -> Timer:
    def timer(stacks: Sequence[nn.Module], tokens: int, progress: Progress) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="kdcli-latency-") as folder:
            graphs = []
            with progress.task("latency table", len(stacks)) as task:
                for number, one in enumerate(stacks):
                    graphs.append(_graph(one, Path(folder) / f"{number}.onnx"))
                    task.advance()
            batch = TEXT.repeated(_pad(stacks[0]) + 1, tokens)
            times = in_turns(
                graphs, [batch] * _MOST, threads=threads, device=device, rounds=ROUNDS, progress=progress
            )
        # What disturbs a run only ever makes it longer, and in every round another run is disturbed.
        return [float(x) for x in np.median(times.min(0), axis=1)]

    return timer


def _graph(model: Any, path: Path) -> Path:
    names = [n for n in TEXT.names if n in accepted(model)]
    device, config = next(model.parameters()).device, model.config
    plain = path.with_suffix(".plain")
    onnx.export(model, TEXT.example(_pad(model) + 1 + _WORDS, names, device), plain)
    if fusion.fuse(plain, path, fused_as=families.presumed(str(config.model_type)).fused_as):
        plain.unlink()
    else:
        plain.replace(path)
    return path


def _pad(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.pad_token_id or 0)
