"""What heads and neurons cost in milliseconds, read off a table of measured sub-layers.

The latency of a model is modelled as a constant rest and one term a sub-layer,

    t = rest + sum over layers of a(H) + f(F),

with a(H) and f(F) the milliseconds of an attention sub-layer of H heads and of a feed-forward sub-layer of F
neurons, measured at some H and F, linear in between, and 0 for a sub-layer without units: what is left of it
is in the rest. A sub-layer costs something before its first unit does any work, so a unit is not worth t / U:
removing it saves the slope. Emptying a whole sub-layer saves more than the slopes of its units.

Source: Kurtic, Frantar, Alistarh 2023, "ZipLM", arXiv:2302.04089, section 3.1 (a latency table a layer, by
the number of heads and the size of the feed-forward layer). Differs: linear between few measured sizes,
where ZipLM measures every size it may choose; the slopes make prices for one budget over all units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcli.families.layer import Layer
from kdcli.families.modules import LowRankLinear, Projection
from kdcli.stages.prune.criterion import Units

LayerKind = tuple[str, ...]
"""``heads`` or ``neurons``, and what else decides the cost of such a sub-layer: the ranks of its factors."""

_FLOOR = 0.01  # of the mean cost of a unit: noise must not make a unit free, or worth less than nothing


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of one sub-layer by its number of units; 0 for none.

    Args:
        units: (K,) counts above 0, ascending.
        milliseconds: (K,) what was measured at these counts, more than an empty sub-layer takes.
    """

    units: tuple[int, ...]
    milliseconds: tuple[float, ...]

    def at(self, count: int) -> float:
        """Milliseconds at ``count`` units: linear between measured counts, and beyond the last one."""
        if not count:
            return 0.0
        y = self._rising()
        if count <= self.units[-1]:
            return float(np.interp(count, self.units, y))
        return float(y[-1]) + (count - self.units[-1]) * self._slope(self.units[-1], y)

    def price(self, count: int) -> float:
        """Milliseconds that one unit less saves on average, from ``count`` units down to the fewest measured."""
        return self._slope(count, self._rising()) if count else 0.0

    def _rising(self) -> np.ndarray:
        """More units never take less time: where the measurement says so, it is its noise."""
        return np.maximum.accumulate(np.maximum(self.milliseconds, 0.0))

    def _slope(self, count: int, y: np.ndarray) -> float:
        first = self.units[0]
        if count > first:
            at = float(np.interp(count, self.units, y))
            slope = (at - float(y[0])) / (min(count, self.units[-1]) - first)
        else:
            slope = float(y[0]) / first
        return max(slope, _FLOOR * float(y[-1]) / self.units[-1], 1e-9)


@dataclass(frozen=True)
class LatencyTable:
    """The latency of a model's parts at one batch size and one length, on one machine."""

    curves: Mapping[LayerKind, LatencyCurve]
    rest: float  # milliseconds of everything that no head and no neuron belongs to

    def anchored(self, layers: Sequence[Layer], milliseconds: float) -> LatencyTable:
        """The table with its curves scaled so that a model of these layers takes what was measured for it.

        Sub-layers measured by themselves need not add up: what one of them leaves in the cache another finds.
        """
        parts = self.total(layers) - self.rest
        factor = max(0.0, milliseconds - self.rest) / parts if parts > 0 else 1.0
        if factor == 0:
            return self
        curves = {
            kind: LatencyCurve(curve.units, tuple(factor * x for x in curve.milliseconds))
            for kind, curve in self.curves.items()
        }
        return LatencyTable(curves, self.rest)

    def total(self, layers: Sequence[Layer]) -> float:
        """Milliseconds of a model whose encoder has these layers now."""
        return self.rest + sum(
            self.curves[kind_of(layer, part)].at(count)
            for layer in layers
            for part, count in (("heads", layer.heads), ("neurons", layer.neurons))
            if count
        )

    def price(self, layers: Sequence[Layer]) -> Units:
        """Milliseconds that every unit saves which the layers have now."""

        def of(part: str) -> list[np.ndarray]:
            counts = [layer.heads if part == "heads" else layer.neurons for layer in layers]
            return [
                np.full(n, self.curves[kind_of(layer, part)].price(n) if n else 0.0)
                for layer, n in zip(layers, counts, strict=True)
            ]

        return Units(of("heads"), of("neurons"))

    def least(self, layers: Sequence[Layer], structure: str) -> float:
        """Milliseconds of the model without any of the units that ``structure`` names."""
        return self.total(layers) - sum(
            self.curves[kind_of(layer, part)].at(layer.heads if part == "heads" else layer.neurons)
            for layer in layers
            for part in structure.split("+")
            if (layer.heads if part == "heads" else layer.neurons)
        )

    def remove(self, layers: Sequence[Layer], structure: str, share: float) -> float:
        """Milliseconds that a cut must save for ``share`` of the model's time to be left.

        At most what all units cost by their slopes; a cut that has to go further empties sub-layers, which
        saves more than that.
        """
        most = float(self.price(layers).only(structure).flat().sum())
        return float(np.clip((1 - share) * self.total(layers), 0.0, most))


def kind_of(layer: Layer, part: str) -> LayerKind:
    """Which curve a sub-layer that has units is on."""
    if part == "heads":
        projections = [layer.query, layer.key, layer.value, layer.attention_output]
    else:
        projections = [layer.ffn_in, layer.ffn_out]
    return (part, *(_form(p) for p in projections))


def sizes(most: int, points: int) -> list[int]:
    """Up to ``points`` counts from about an eighth of ``most`` to ``most``, ascending, evenly spread.

    >>> sizes(12, 4), sizes(1536, 5), sizes(2, 5)
    ([2, 5, 8, 12], [192, 528, 864, 1200, 1536], [1, 2])
    """
    return sorted({max(1, round(x)) for x in np.linspace(most / 8, most, points)})


def _form(projection: Projection) -> str:
    return f"rank {projection.rank}" if isinstance(projection, LowRankLinear) else "dense"
