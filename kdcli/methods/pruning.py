"""What a method of pruning is given, and what it gives back.

A module in ``methods/prune/`` says in ``STRUCTURES`` what it can decide on. For ``heads``, ``neurons`` and
``heads+neurons`` it has

    prune(job: UnitJob, config: Config) -> Found        cuts the units of job.model, in place

and for ``weights`` and ``n:m``

    zero(job: WeightJob, config: Config) -> dict[str, Tensor]      True where a weight stays

which may also change the weights that stay. Both kinds of ``Config`` have ``samples`` and ``batch_size`` when they
read training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from kdcli.models.families import Layer
from kdcli.models.transforms import Cut
from kdcli.progress import Progress

Batch = tuple[Mapping[str, Tensor], Tensor]
"""Model inputs, and labels (B,): the rows' own, or the model's answer where a row has none."""


@dataclass(frozen=True)
class Units:
    """Something per head and per neuron of every encoder layer: L arrays (H,) and L arrays (F,)."""

    heads: list[np.ndarray]
    neurons: list[np.ndarray]

    def flat(self) -> np.ndarray:
        """All heads, layer by layer, then all neurons: (sum of H + sum of F,)."""
        return np.concatenate([*self.heads, *self.neurons])

    def only(self, structure: str) -> Units:
        """Only the kinds in ``structure`` (``heads``, ``neurons``, ``heads+neurons``)."""
        kinds = structure.split("+")
        return Units(
            self.heads if "heads" in kinds else [x[:0] for x in self.heads],
            self.neurons if "neurons" in kinds else [x[:0] for x in self.neurons],
        )

    def like(self, flat: np.ndarray) -> Units:
        """Split a flat array the way :meth:`flat` joins this one."""
        parts = np.split(flat, np.cumsum([len(x) for x in (*self.heads, *self.neurons)])[:-1])
        return Units(parts[: len(self.heads)], parts[len(self.heads) :])


Price = Callable[[Sequence[Layer]], Units]
"""What every unit costs that the layers have now: multiply-accumulates, or milliseconds."""


@dataclass(frozen=True)
class UnitJob:
    """Heads and neurons to cut out of one model."""

    model: nn.Module  # in eval mode
    layers: Sequence[Layer]  # its encoder layers
    structure: str  # heads, neurons or heads+neurons
    price: Price
    remove: float  # in the unit of the price: what the cut must save, at most what all units cost
    batches: Sequence[Batch]
    iterative: bool = True  # judge again after every part of the cut
    seed: int = 0
    progress: Progress = field(default_factory=Progress)


@dataclass
class Found:
    """What was cut out, and how it was found."""

    cut: Cut  # leads from the model as it came to the model as it is; names only the layers that changed
    trace: list[dict[str, Any]] = field(default_factory=list)  # one entry a step
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """Which zeros are asked for: a share of the weights, or of every M neighbours along the input only N stay."""

    sparsity: float = 0.0
    n: int = 0
    m: int = 0  # 0: the share counts


@dataclass(frozen=True)
class WeightJob:
    """Single weights to set to zero in one model."""

    model: nn.Module  # in eval mode
    matrices: Mapping[str, nn.Linear]  # dotted name -> layer, from the first to the last
    pattern: Pattern
    batches: Sequence[Batch]
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
