"""``--target-speedup``: what is cut by a prediction is measured as the graph that ships, and corrected."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from kdcli.context import Context
from kdcli.devices import session_device
from kdcli.export import graph as graphs
from kdcli.measure import environment, measurement
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.probe import layer_clock
from kdcli.report.schema import Warning_
from kdcli.timing import Timings

ROUNDS = 3
"""Tries at most: the first by a prediction, the others corrected by what the one before measured."""

_RUNS = 7
_SLACK = 0.02  # a speed-up is not known better than that
_OVER = 0.1  # more than that above the target gives away accuracy

Result = TypeVar("Result")


@dataclass(frozen=True)
class Speed:
    """A measured speed-up and its standard error."""

    value: float
    noise: float

    def reaches(self, target: float) -> bool:
        """Whether it is the target or more, as far as it is known."""
        return self.value >= target - max(self.noise, _SLACK * target)


Measure = Callable[[Context, Checkpoint], Speed]


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """One try: what was made, the speed-up that was predicted and the one that was measured, more for the report."""

    result: Result
    predicted: float
    speed: Speed
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen(Generic[Result]):
    """Where the tries ended: what the best one made, its number from 0, and a row for each."""

    result: Result
    number: int
    tries: list[dict[str, Any]]


def correct(
    context: Context,
    target: float,
    attempt: Callable[[float], Attempt[Result] | None],
    *,
    rounds: int = ROUNDS,
) -> Chosen[Result]:
    """Try shares of the time until one meets the target and is not much faster than that.

    Args:
        context: Its observer is told of every try.
        target: Speed-up, above 1.
        attempt: Makes a model that should take this share of the input's time and measures it; None where it has made
            the very same before. The first one always makes one.
        rounds: Tries at most.

    Returns:
        Of those that meet the target the slowest, which was cut least; without any, the fastest.
    """
    tries: list[dict[str, Any]] = []
    best: tuple[int, Attempt[Result]] | None = None
    share = 1 / target
    for number in range(rounds):
        made = attempt(share)
        if made is None:
            break
        speed = made.speed
        tries.append(
            {
                "share_of_time": share,
                **made.facts,
                "predicted": made.predicted,
                "measured": speed.value,
                "noise": speed.noise,
            }
        )
        context.progress.note(
            f"{target:g} times faster asked for, {made.predicted:.2f} predicted, {speed.value:.2f} measured"
        )
        if best is None or _better(speed, best[1].speed, target):
            best = number, made
        if speed.reaches(target) and speed.value <= target * (1 + _OVER) + speed.noise:
            break
        share = corrected(tries, target)
    assert best is not None
    return Chosen(best[1].result, best[0], tries)


def corrected(tries: Sequence[Mapping[str, Any]], target: float) -> float:
    """The share of the time to try next.

    Between a try that was too fast and one that was too slow, a straight line in the measured time: a graph's time has
    steps, where widths no longer fit what the processor likes, and one factor would jump over them again and again.
    With tries on one side only, what was saved is taken to be off by one factor, as far as one number can tell.
    """
    goal = 1 / target
    points = [(row["share_of_time"], 1 / row["measured"]) for row in tries]
    fast = max((p for p in points if p[1] <= goal), default=None)
    slow = min((p for p in points if p[1] > goal), default=None)
    if fast and slow and fast[0] < slow[0]:
        return float(fast[0] + (slow[0] - fast[0]) * (goal - fast[1]) / (slow[1] - fast[1]))
    saved = max(1 - points[-1][1], 1e-6)
    return max(0.0, 1 - (1 - 1 / tries[-1]["predicted"]) * min(2.0, (1 - goal) / saved))


def summary(target: float, chosen: Chosen[Any]) -> dict[str, Any]:
    """What the report says of the tries."""
    best = chosen.tries[chosen.number]
    parts = {key: best[key] for key in ("predicted", "measured", "noise")}
    return {"target": target, **parts, "tries": chosen.tries}


def missed(found: Mapping[str, Any]) -> list[Warning_]:
    """The warning that a :func:`summary` asks for, if any."""
    if Speed(found["measured"], found["noise"]).reaches(found["target"]):
        return []
    said = f"{found['measured']:.2f} times faster at batch 1 where {found['target']:g} was asked for"
    return [Warning_(code="speedup-missed", message=said)]


def against_input(context: Context, checkpoint: Checkpoint) -> Speed:
    """How many times faster than the input a model is at batch 1, on rows of the measured split, in turns."""
    rows = context.encoded["test" if "test" in context.encoded else "validation"]
    threads, device, progress = environment.threads(), session_device(context.device), context.progress
    before = context.input_graph
    if before is None:
        given = checkpoints.load(context.checkpoint.path, device=context.device)
        before, _ = graphs.of_input(given, rows, threads=threads, timings=Timings(), progress=progress)
    with tempfile.TemporaryDirectory(prefix="kdcli-speed-") as folder:
        after = graphs.build(
            checkpoint,
            Path(folder) / graphs.FILE,
            rows,
            threads=threads,
            timings=Timings(),
            progress=progress,
        ).path
        batches = measurement.latency_batches(rows, checkpoint.pad_id, 1)
        times = layer_clock.in_turns(
            [before, after], batches, threads=threads, device=device, rounds=_RUNS, progress=progress
        )
    return speed_of(times[:, 0], times[:, 1])


def speed_of(before: np.ndarray, after: np.ndarray) -> Speed:
    """The ratio of two medians over all runs, which is what the report compares, and its standard error.

    Runs of one round share what the machine does at that time, so that rounds differ more than their runs let expect.
    The error is that of the mean of the rounds' own ratios.

    Args:
        before: Milliseconds (R, B) of the input in R rounds on B batches.
        after: Those of the result.
    """
    rounds = np.median(before, axis=1) / np.median(after, axis=1)
    error = float(np.std(rounds, ddof=1)) / len(rounds) ** 0.5 if len(rounds) > 1 else 0.0
    return Speed(float(np.median(before) / np.median(after)), error)


def _better(one: Speed, other: Speed, target: float) -> bool:
    limit = target * (1 - _SLACK)
    if (one.value >= limit) != (other.value >= limit):
        return one.value >= limit
    return one.value < other.value if one.value >= limit else one.value > other.value
