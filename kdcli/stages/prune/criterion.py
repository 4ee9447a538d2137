"""What a method of pruning is given, and what it gives back.

A file of ``criteria/`` declares in ``METHOD`` a :class:`Criterion`, which says by what it offers what it can decide on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.families.layer import Layer
from kdcli.inputs.feeding import Labelled
from kdcli.models.transforms import Cut
from kdcli.progress import Progress
from kdcli.registry import MethodSpec
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task


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
    batches: Sequence[Labelled]
    iterative: bool = True  # judge again after every part of the cut
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    #: What a method found out about the model as it came, by a name of its own: the same model may come again
    #: with another ``remove``.
    memo: dict[str, Any] = field(default_factory=dict)
    task: Task = CLASSIFICATION


@dataclass
class UnitsCut:
    """What was cut out, and how it was found."""

    cut: Cut  # leads from the model as it came to the model as it is; names only the layers that changed
    trace: list[dict[str, Any]] = field(default_factory=list)  # one entry a step
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """Which zeros are asked for: a share of the weights, or of every M neighbours along the input only N stay."""

    sparsity: float = 0.0  # the share; with N of M it is 1 - N / M
    n: int = 0
    m: int = 0  # 0: the share alone counts


@dataclass(frozen=True)
class WeightJob:
    """Single weights to set to zero in one model."""

    model: nn.Module  # in eval mode
    layers: Sequence[Layer]  # its encoder layers
    matrices: Mapping[
        str, nn.Linear
    ]  # dotted name -> layer, from the first to the last; all of them in layers
    pattern: Pattern
    batches: Sequence[Labelled]
    seed: int = 0
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class LayerJob:
    """Whole encoder layers to drop from one model."""

    model: nn.Module  # in eval mode
    family: Encoder
    prices: np.ndarray  # (L,), what each layer costs
    remove: float  # in the unit of the prices; less than all layers cost
    batches: Sequence[Labelled]
    progress: Progress = field(default_factory=Progress)
    task: Task = CLASSIFICATION


@dataclass(frozen=True)
class WidthJob:
    """Features of the residual stream to cut out of one model."""

    model: nn.Module  # in eval mode
    family: Encoder
    keep: int  # features, at least 1
    batches: Sequence[Labelled]
    progress: Progress = field(default_factory=Progress)


@dataclass
class Kept:
    """What stays of the layers or features, in their numbering before and their order, and how it was found."""

    keep: list[int]
    trace: list[dict[str, Any]] = field(default_factory=list)  # one entry a step
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenJob:
    """Tokens to drop from a model and its tokenizer."""

    counts: np.ndarray  # (V,), how often each token occurs in the given texts
    protected: np.ndarray  # (V,) bool, True where a token has to stay


def some_rows(batches: Sequence[Labelled], rows: int) -> list[Labelled]:
    """Every so many rows of every batch, about ``rows`` in all; batches of all lengths are among them."""
    every = max(1, round(sum(len(labels) for _, labels in batches) / rows))
    return [({name: x[::every] for name, x in inputs.items()}, labels[::every]) for inputs, labels in batches]


def _does_not(job: Any, config: Any) -> NoReturn:
    raise AssertionError("the criterion's structures are asked before it is called")


@dataclass(frozen=True, kw_only=True)
class Criterion(MethodSpec):
    """A method of pruning: what it does for which structures.

    Its ``config`` has ``samples`` and ``batch_size`` where it reads training rows, and ``steps`` where it can judge
    the model again after every part of a cut.
    """

    #: Weights and n:m: True where a weight stays. May change the weights that stay; zeros go first.
    zero: Callable[[WeightJob, Any], dict[str, Tensor]] = _does_not
    #: Heads, neurons, or both: cuts units of the job's model, in place.
    prune: Callable[[UnitJob, Any], UnitsCut] = _does_not
    #: Layers: says which stay.
    choose: Callable[[LayerJob, Any], Kept] = _does_not
    #: Width: cuts features of the job's model, in place.
    narrow: Callable[[WidthJob, Any], Kept] = _does_not
    #: Vocabulary: (V,) bool, True where a token stays.
    keep: Callable[[TokenJob, Any], np.ndarray] = _does_not
    trained: bool = False  # finds zeros by training, which ``learned_masks`` does

    @property
    def structures(self) -> tuple[str, ...]:
        """What it can prune, as ``--structure`` has it."""
        offered = (
            (self.trained or self.zero is not _does_not, ("weights", "n:m")),
            (self.prune is not _does_not, ("heads", "neurons", "heads+neurons")),
            (self.choose is not _does_not, ("layers",)),
            (self.narrow is not _does_not, ("width",)),
            (self.keep is not _does_not, ("vocab",)),
        )
        return tuple(name for there, names in offered if there for name in names)

    @property
    def reads_rows(self) -> bool:
        """Whether it looks at training rows."""
        return "samples" in self.settings

    @property
    def scores_again(self) -> bool:
        """Whether it can judge the model again after every part of a cut."""
        return "steps" in self.settings
