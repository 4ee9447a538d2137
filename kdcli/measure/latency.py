"""Latency of one runtime at one batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdcli.inputs import kinds
from kdcli.inputs.batching import Arrays
from kdcli.report.schema import Latency


@dataclass(frozen=True)
class Samples:
    """Timed runs of one batch size: (n,) milliseconds, and (n,) mean real tokens a row of the batch run."""

    size: int
    milliseconds: np.ndarray
    tokens: np.ndarray


def measure(
    run: Callable[[Arrays], object],
    batches: Sequence[Arrays],
    *,
    runtime: str,
    threads: int,
    warmup: int = 5,
    min_runs: int = 30,
    max_runs: int = 400,
    max_seconds: float = 3.0,
) -> Latency:
    """Time ``run`` on real batches and sum it up; see :func:`collect` and :func:`summarise`."""
    samples = collect(
        run, batches, warmup=warmup, min_runs=min_runs, max_runs=max_runs, max_seconds=max_seconds
    )
    return summarise([samples], runtime=runtime, threads=threads)


def collect(
    run: Callable[[Arrays], object],
    batches: Sequence[Arrays],
    *,
    warmup: int = 5,
    min_runs: int = 30,
    max_runs: int = 400,
    max_seconds: float = 3.0,
) -> Samples:
    """Time ``run`` on real batches of one size, as :func:`times` does; their lengths are the data's own."""
    found = times(run, batches, warmup=warmup, min_runs=min_runs, max_runs=max_runs, max_seconds=max_seconds)
    size = kinds.size(batches[0])
    tokens = np.array([kinds.tokens(batch) / size for batch in batches])
    return Samples(size, found, tokens[np.arange(len(found)) % len(batches)])


def times(
    run: Callable[[Arrays], object],
    batches: Sequence[Arrays],
    *,
    warmup: int = 5,
    min_runs: int = 30,
    max_runs: int = 400,
    max_seconds: float = 3.0,
) -> np.ndarray:
    """Milliseconds (n,) of ``run`` on the batches, one after the other, over and over.

    Args:
        run: Runs one batch to its end.
        batches: At least one.
        warmup: Untimed runs first.
        min_runs: Timed runs even when they take longer than ``max_seconds``.
        max_runs: No more than this many.
        max_seconds: Stop after this much time.
    """
    for i in range(warmup):
        run(batches[i % len(batches)])
    found: list[int] = []
    begun = time.perf_counter_ns()
    while len(found) < max_runs:
        if len(found) >= min_runs and time.perf_counter_ns() - begun > max_seconds * 1e9:
            break
        batch = batches[len(found) % len(batches)]
        started = time.perf_counter_ns()
        run(batch)
        found.append(time.perf_counter_ns() - started)
    return np.array(found) / 1e6


def summarise(samples: Sequence[Samples], *, runtime: str, threads: int) -> Latency:
    """Percentiles and throughput over all rounds of one batch size.

    Args:
        samples: One or more rounds.
        runtime: ``onnx`` or ``torch``, for the report.
        threads: That the runtime used, for the report.
    """
    milliseconds = np.concatenate([one.milliseconds for one in samples])
    tokens = np.concatenate([one.tokens for one in samples])
    p50, p90, p99 = (float(x) for x in np.percentile(milliseconds, [50, 90, 99]))
    size = samples[0].size
    return Latency(
        runtime=runtime,
        batch=size,
        sequence=round(float(tokens.mean()), 2),
        threads=threads,
        p50_ms=round(p50, 4),
        p90_ms=round(p90, 4),
        p99_ms=round(p99, 4),
        throughput_per_s=round(size * len(milliseconds) / (float(milliseconds.sum()) / 1e3), 2),
        n=len(milliseconds),
    )
