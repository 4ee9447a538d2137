"""Ranges of activations, found from a stream of values in constant memory.

A :class:`Histogram` counts values on a grid of bins that starts at zero and whose width is a power of two. When
a value lies outside, the width doubles and neighbouring bins are joined, which loses no count and moves none
across an edge. So the histogram after the last batch depends on the values alone: not on their order, not on
how they were cut into batches, and memory stays the same from the first row to the last.

Four rules turn it into a range (low, high) with low <= 0 <= high, so that zero is always represented exactly:

    minmax      the smallest and the largest value seen
    percentile  the range that leaves out a share 1 - p of the values, half of it at either end
    entropy     the range whose 256 levels lose the least information:  argmin KL(P || Q)
    mse         the range with the least squared error:  argmin E (x - Q(x))^2

For ``entropy`` P is the histogram cut to the range, with what lies outside counted in the end bins; Q is the same
cut merged into 256 levels and spread evenly again over the bins of a level that are not empty.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1 (affine quantisation with an exact zero); Migacz 2017,
"8-bit inference with TensorRT", GTC (entropy); Nagel et al. 2021, "A White Paper on Neural Network
Quantization", arXiv:2106.08295, section 3.1 (mse).
Differs: both ends are searched, one after the other, where Migacz has one threshold for both signs; the grid
grows with the data, where onnxruntime keeps every activation of every row until the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcli.errors import InputError

LEVELS = 256  # of uint8
HALF = 8192  # bins on either side of zero; a power of two
_CANDIDATES = 128  # positions of an end that entropy and mse try
_SWEEPS = 2  # over both ends
_SMOOTH = 1e-4  # share of a bin where P has something and Q nothing, as onnxruntime and MXNet have it
_SMALLEST = -126  # exponent of the smallest normal float32

Rule = Literal["minmax", "percentile", "entropy", "mse"]
PERCENTILE = 99.99


@dataclass(frozen=True)
class Affine:
    """x ~ scale * (q - zero), q in 0..levels - 1."""

    scale: float
    zero: int
    levels: int = LEVELS

    @property
    def low(self) -> float:
        """The smallest value that is represented."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """The largest value that is represented."""
        return (self.levels - 1 - self.zero) * self.scale


def affine(low: float, high: float, levels: int = LEVELS) -> Affine:
    """The scale and zero point of a range; scale is a float32 value, and 1 for an empty range."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / (levels - 1)))
    if scale < np.finfo(np.float32).tiny:  # a subnormal scale has too few digits to divide by
        return Affine(1.0, 0, levels)
    return Affine(scale, min(levels - 1, max(0, round(-low / scale))), levels)


class Histogram:
    """Counts of a stream of values on a grid that grows with them.

    Bin i of 2 * HALF holds values x with floor(x / width) = i - HALF.
    """

    def __init__(self) -> None:
        self.count = 0
        self.low = math.inf
        self.high = -math.inf
        self.exponent = _SMALLEST
        self.counts = np.zeros(2 * HALF, dtype=np.int64)

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Take in values of any shape; the caller has left padding out.

        Raises:
            InputError: NaN or infinity among them.
        """
        flat = values.detach().float().flatten()
        if not len(flat):
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("an activation is NaN or infinite on a calibration row, so it has no range")
        self._grow(max(-low, high))
        # A power of two divides without rounding, so every value falls into the bin of its real number.
        at = (flat / self.width).floor_().to(torch.int64).add_(HALF)
        self.counts += torch.bincount(at, minlength=2 * HALF).cpu().numpy()
        self.count += len(flat)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _grow(self, largest: float) -> None:
        """Double the width until ``largest`` lies inside on either side."""
        # frexp: largest < 2^exponent, so largest / width < HALF.
        wanted = max(_SMALLEST, math.frexp(largest)[1] - (HALF.bit_length() - 1))
        if (steps := wanted - self.exponent) <= 0:
            return
        seen = np.flatnonzero(self.counts)
        merged = np.zeros_like(self.counts)
        np.add.at(merged, ((seen - HALF) >> min(steps, HALF.bit_length())) + HALF, self.counts[seen])
        self.counts, self.exponent = merged, wanted

    def edges(self) -> tuple[int, int]:
        """First bin that is used and the one behind the last, widened to zero."""
        used = np.flatnonzero(self.counts)
        return min(int(used[0]), HALF), max(int(used[-1]) + 1, HALF)

    def between(self, start: int, stop: int) -> tuple[float, float]:
        """Values at two edges, never beyond what was seen."""
        low, high = (start - HALF) * self.width, (stop - HALF) * self.width
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))


def find_range(
    histogram: Histogram, rule: Rule, *, percentile: float = PERCENTILE, levels: int = LEVELS
) -> tuple[float, float]:
    """The range (low, high) of a tensor by one of the four rules.

    Args:
        histogram: Of at least one value.
        rule: Which one.
        percentile: p in percent, for that rule.
        levels: How many integers there are, for entropy and mse.

    Raises:
        InputError: The histogram is empty.
    """
    if not histogram.count:
        raise InputError("a calibration without rows gives no range")
    if rule == "percentile":
        return _percentile(histogram, percentile)
    if rule == "entropy":
        return _by_ends(histogram, _information_lost(histogram, levels), shortest=levels)
    if rule == "mse":
        return _by_ends(histogram, _squared_error(histogram, levels), shortest=1)
    return min(0.0, histogram.low), max(0.0, histogram.high)


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    share = (1 - percentile / 100) / 2 * histogram.count
    below = np.cumsum(histogram.counts)
    # The bins that hold the value number `share` counted from either end.
    start = int(np.searchsorted(below, share, side="right"))
    stop = int(np.searchsorted(below, histogram.count - share, side="left")) + 1
    return histogram.between(start, stop)


def _information_lost(histogram: Histogram, levels: int) -> Callable[[int, int], float]:
    counts, before = histogram.counts, np.concatenate([[0], np.cumsum(histogram.counts)])

    def cost(start: int, stop: int) -> float:
        below, above = int(before[start]), int(before[-1] - before[stop])
        return divergence(counts[start:stop], below, above, levels)

    return cost


def _squared_error(histogram: Histogram, levels: int) -> Callable[[int, int], float]:
    used = np.flatnonzero(histogram.counts)
    counts, centres = histogram.counts[used], (used - HALF + 0.5) * histogram.width

    def cost(start: int, stop: int) -> float:
        return squared_error(centres, counts, affine(*histogram.between(start, stop), levels))

    return cost


def divergence(counts: np.ndarray, below: int, above: int, levels: int) -> float:
    """KL(P || Q) of a cut of a histogram, in nats.

    Args:
        counts: (N,) of the bins inside.
        below: How many values lie under the first bin.
        above: How many lie over the last.
        levels: Neighbouring bins are merged into so many levels, as evenly as N allows.
    """
    size = len(counts)
    inside = counts.astype(np.float64)
    clipped = inside.copy()
    clipped[0] += below
    clipped[-1] += above
    filled = clipped > 0
    level = np.arange(size) * levels // size if size > levels else np.arange(size)
    total = np.bincount(level, weights=inside)
    bins = np.bincount(level, weights=filled)
    spread = np.where(filled, (total / np.maximum(bins, 1))[level], 0.0)
    p, q = _smooth(clipped), _smooth(spread)
    if q is None or p is None:
        return math.inf
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())


def _smooth(counts: np.ndarray) -> np.ndarray | None:
    """A distribution without zeros: every empty bin takes a little from those that are not."""
    empty = counts == 0
    zeros, others = int(empty.sum()), int((~empty).sum())
    if not others:
        return None
    taken = _SMOOTH * zeros / others
    made = np.where(empty, _SMOOTH, counts - taken)
    return made / made.sum() if made.min() > 0 else None


def squared_error(values: np.ndarray, counts: np.ndarray, rounding: Affine) -> float:
    """Sum over ``values`` (N,), each as often as ``counts`` (N,) says, of (x - Q(x))^2."""
    rounded = np.clip(np.round(values / rounding.scale) + rounding.zero, 0, rounding.levels - 1)
    return float((((rounded - rounding.zero) * rounding.scale - values) ** 2 * counts).sum())


def _by_ends(
    histogram: Histogram, cost: Callable[[int, int], float], *, shortest: int
) -> tuple[float, float]:
    """Move one end after the other to where the cost is least; of equal costs the wider range is better."""
    first, last = histogram.edges()
    shortest = min(shortest, last - first)
    start, stop = first, last
    for _ in range(_SWEEPS):
        before = (start, stop)
        stop = min((at for at in _positions(last) if at - start >= shortest), key=lambda at: cost(start, at))
        start = min((at for at in _positions(first) if stop - at >= shortest), key=lambda at: cost(at, stop))
        if (start, stop) == before:
            break
    return histogram.between(start, stop)


def _positions(end: int) -> list[int]:
    """Edges from ``end`` towards that of zero, both included."""
    return sorted({int(at) for at in np.round(np.linspace(end, HALF, _CANDIDATES + 1))}, reverse=end >= HALF)
