"""Latency of one runtime at one batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdcli.report.schema import Latency

Batch = Mapping[str, np.ndarray]


def measure(
    run: Callable[[Batch], object],
    batches: Sequence[Batch],
    *,
    runtime: str,
    threads: int,
    warmup: int = 5,
    min_runs: int = 30,
    max_runs: int = 400,
    max_seconds: float = 3.0,
) -> Latency:
    """Time ``run`` on real batches, one after the other, over and over.

    Args:
        run: Runs one batch to its end.
        batches: Arrays (B, T) of the same B; their lengths are the data's own.
        runtime: ``onnx`` or ``torch``, for the report.
        threads: That the runtime uses, for the report.
        warmup: Untimed runs first.
        min_runs: Timed runs even when they take longer than ``max_seconds``.
        max_runs: No more than this many.
        max_seconds: Stop after this much time.
    """
    for i in range(warmup):
        run(batches[i % len(batches)])
    times: list[int] = []
    used: list[int] = []
    begun = time.perf_counter_ns()
    while len(times) < max_runs:
        if len(times) >= min_runs and time.perf_counter_ns() - begun > max_seconds * 1e9:
            break
        which = len(times) % len(batches)
        started = time.perf_counter_ns()
        run(batches[which])
        times.append(time.perf_counter_ns() - started)
        used.append(which)
    milliseconds = np.array(times) / 1e6
    size = int(batches[0]["input_ids"].shape[0])
    tokens = np.array([float(b["attention_mask"].sum()) / size for b in batches])
    p50, p90, p99 = (float(x) for x in np.percentile(milliseconds, [50, 90, 99]))
    return Latency(
        runtime=runtime,
        batch=size,
        sequence=round(float(tokens[used].mean()), 2),
        threads=threads,
        p50_ms=round(p50, 4),
        p90_ms=round(p90, 4),
        p99_ms=round(p99, 4),
        throughput_per_s=round(size * len(times) / (float(milliseconds.sum()) / 1e3), 2),
        n=len(times),
    )
