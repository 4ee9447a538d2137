"""Latency against a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from kdcli.inputs.batching import Arrays
from kdcli.measure import latency


class Clock:
    """Time passes only while :meth:`run` runs, by the next duration of the list, over and over."""

    def __init__(self, milliseconds: Sequence[float]) -> None:
        self.now = 0
        self.calls: list[int] = []
        self._durations = self._cycle(milliseconds)

    @staticmethod
    def _cycle(values: Sequence[float]) -> Iterator[float]:
        while True:
            yield from values

    def run(self, batch: Arrays) -> None:
        self.calls.append(int(batch["input_ids"].shape[1]))
        self.now += round(next(self._durations) * 1e6)


Turn = Callable[[Sequence[float]], Clock]


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> Turn:
    def make(milliseconds: Sequence[float]) -> Clock:
        clock = Clock(milliseconds)
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter_ns=lambda: clock.now))
        return clock

    return make


def batch(rows: int, width: int, tokens: int) -> dict[str, np.ndarray]:
    """``rows`` rows padded to ``width`` with ``tokens`` real tokens in all."""
    mask = np.zeros(rows * width, dtype=np.int64)
    mask[:tokens] = 1
    return {
        "input_ids": np.ones((rows, width), dtype=np.int64),
        "attention_mask": mask.reshape(rows, width),
    }


def test_percentiles_and_throughput_are_those_of_the_timed_runs(turn: Turn) -> None:
    # Two slow warm-up runs, then 1 to 100 ms.
    clock = turn([900.0, 900.0, *(float(i) for i in range(1, 101))])
    found = latency.measure(
        clock.run, [batch(4, 8, 20)], runtime="onnx", threads=3, warmup=2, min_runs=100, max_seconds=0.0
    )
    # Linear interpolation between order statistics: 1 + 99 q.
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == pytest.approx((50.5, 90.1, 99.01), abs=1e-9)
    assert found.throughput_per_s == pytest.approx(100 * 4 / 5.05, abs=0.005)
    assert (found.n, found.batch, found.runtime, found.threads) == (100, 4, "onnx", 3)
    assert len(clock.calls) == 102


@pytest.mark.parametrize(
    ("milliseconds", "runs"),
    [
        (1000.0, 30),  # slow: the minimum, whatever it takes
        (25.0, 41),  # the first run that ends after one second is the last
        (0.001, 60),  # fast: no more than the maximum
    ],
)
def test_how_long_it_times(turn: Turn, milliseconds: float, runs: int) -> None:
    clock = turn([milliseconds])
    found = latency.measure(
        clock.run,
        [batch(1, 4, 4)],
        runtime="onnx",
        threads=1,
        warmup=0,
        min_runs=30,
        max_runs=60,
        max_seconds=1.0,
    )
    assert found.n == len(clock.calls) == runs


def test_batches_take_turns_and_padding_does_not_count_as_length(turn: Turn) -> None:
    clock = turn([1.0])
    batches = [batch(2, 8, 6), batch(2, 5, 10), batch(2, 9, 4)]
    found = latency.measure(
        clock.run, batches, runtime="torch", threads=1, warmup=1, min_runs=4, max_runs=4, max_seconds=0.0
    )
    assert clock.calls == [8, 8, 5, 9, 8]
    assert found.sequence == pytest.approx((3 + 5 + 2 + 3) / 4)


def test_the_real_clock_counts_milliseconds() -> None:
    def run(_: Arrays) -> None:
        time.sleep(0.003)

    found = latency.measure(
        run, [batch(2, 4, 8)], runtime="torch", threads=1, warmup=0, min_runs=5, max_seconds=0.0
    )
    assert 3.0 <= found.p50_ms <= found.p90_ms <= found.p99_ms < 3000
    assert 0 < found.throughput_per_s <= 2 / 0.003
