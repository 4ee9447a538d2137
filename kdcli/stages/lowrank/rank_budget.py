"""How many directions each layer keeps when all of them share one budget of parameters or of time.

Two shares are known to be reasonable and neither always wins: the even one (every layer keeps the same
fraction) and one that minimises the damage. They, and the mean of the two, are candidates; the caller tries
them on held rows and keeps the best.

The damage of a layer at a rank is the divergence that the model shows when that layer alone is factorised. Its
shape over the ranks is predicted from second derivatives; its size is measured at a few ranks, where the
prediction is off by a factor that differs from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.tasks.task import Task

Ranks = dict[str, int | None]
"""Layer name -> rank, or None where the layer stays dense."""

GRADIENT_ROWS = 256
"""Rows whose gradients weigh the layers, for methods that do not say how many they want."""

# No layer is cut below this by predicted damage alone, which is only a local prediction.
_LOWEST = 8


@dataclass(frozen=True)
class LayerSize:
    """Shape of a matrix (O, I), the length of its bias (O or 0), and parameters that only its factors have."""

    outputs: int
    inputs: int
    bias: int
    added: int = 0

    @property
    def dense(self) -> int:
        """Parameters of the layer as it is."""
        return self.outputs * self.inputs + self.bias

    @property
    def break_even(self) -> float:
        """The rank at which two factors have as many weights as the matrix: O I / (O + I) if nothing is added."""
        return (self.outputs * self.inputs - self.added) / (self.outputs + self.inputs)

    def settle(self, rank: int) -> int | None:
        """The rank, or None (stay dense) at or above break-even."""
        return rank if rank < self.break_even else None

    def parameters(self, rank: int | None) -> int:
        """Parameters at this rank."""
        return self.dense if rank is None else rank * (self.outputs + self.inputs) + self.bias + self.added


def size_of(layer: nn.Linear | nn.Embedding) -> LayerSize:
    """The size of a plain linear layer, or of a table of V tokens, whose factors have a bias of their own."""
    if isinstance(layer, nn.Embedding):
        return LayerSize(layer.embedding_dim, layer.num_embeddings, 0, layer.embedding_dim)
    return LayerSize(layer.out_features, layer.in_features, 0 if layer.bias is None else layer.out_features)


def total(sizes: Mapping[str, LayerSize], ranks: Ranks) -> int:
    """Parameters of all layers at these ranks."""
    return sum(size.parameters(ranks[name]) for name, size in sizes.items())


def even(sizes: Mapping[str, LayerSize], budget: float) -> Ranks:
    """Give every layer the share ``budget`` of its own parameters, at least rank 1.

    Args:
        sizes: The layers.
        budget: In (0, 1); the bias counts on both sides.

    Raises:
        UsageError: Rank 1 everywhere is already more than the budget.
    """
    ranks: Ranks = {}
    for name, size in sizes.items():
        rank = int((budget * size.dense - size.bias - size.added) // (size.outputs + size.inputs))
        ranks[name] = size.settle(max(1, rank))
    dense = sum(s.dense for s in sizes.values())
    if total(sizes, ranks) > budget * dense:
        least = sum(min(s.dense, s.parameters(1)) for s in sizes.values()) / dense
        raise UsageError(
            f"--budget {budget} cannot be met: rank 1 in every layer keeps {least:.2%} of the parameters",
            "give a larger budget, or include larger layers",
        )
    return ranks


def by_damage(sizes: Mapping[str, LayerSize], damage: Mapping[str, np.ndarray], budget: float) -> Ranks:
    """Minimise the summed damage under a budget of parameters; see :func:`least`.

    Args:
        sizes: The layers.
        damage: Name -> (K + 1,) damage at the ranks 0 ... K, falling.
        budget: In (0, 1), as for :func:`even`.

    Raises:
        UsageError: As for :func:`even`.
    """
    lowest = {n: r if r is None else min(r, _LOWEST) for n, r in even(sizes, budget).items()}
    allowed = budget * sum(s.dense for s in sizes.values())
    choices: dict[str, Choices] = {}
    for name, size in sizes.items():
        low = lowest[name]
        thin = [] if low is None else [r for r in range(low, len(damage[name])) if r < size.break_even]
        options: list[int | None] = [*thin, None]
        cost = np.array([size.parameters(r) for r in options], dtype=np.float64)
        choices[name] = Choices(options, cost, np.append(damage[name][thin], 0.0))
    return {name: choices[name].options[i] for name, i in least(choices, allowed).items()}


@dataclass(frozen=True)
class Choices:
    """What one layer may become: ``options`` of rising ``cost`` (n,) and falling ``damage`` (n,); the last is dense."""

    options: Sequence[Any]
    cost: np.ndarray
    damage: np.ndarray


def least(choices: Mapping[str, Choices], allowed: float) -> dict[str, int]:
    """Pick an option for every layer so that the summed damage is least under the summed cost ``allowed``.

    Every layer takes what minimises damage + price * cost; the price is found by bisection, and what is left
    then goes step by step to where it helps most. Up to that rounding this is the optimum among the shares
    on the lower convex hull. When even the cheapest options cost more than ``allowed``, they are returned.
    """
    unit = max(float(c.cost.max()) for c in choices.values()) or 1.0

    def at(price: float) -> dict[str, int]:
        return {n: int(np.argmin(c.damage + price * c.cost / unit)) for n, c in choices.items()}

    def spent(picked: Mapping[str, int]) -> float:
        return sum(float(choices[n].cost[i]) for n, i in picked.items())

    steps = [
        float(np.diff(np.sort(c.cost)).min(initial=unit, where=np.diff(np.sort(c.cost)) > 0))
        for c in choices.values()
    ]
    worst = sum(float(c.damage.max()) for c in choices.values()) or 1.0
    # Logarithms of the price: at the dearest, the smallest step of cost is worth more than all damage.
    free, dear = -80.0, float(np.log(worst) + np.log(unit / min(steps)) + 1.0)
    for _ in range(100):
        middle = (free + dear) / 2
        if spent(at(np.exp(middle))) > allowed:
            free = middle
        else:
            dear = middle
    picked = at(np.exp(dear))
    _spend(choices, picked, allowed - spent(picked))
    return picked


def _spend(choices: Mapping[str, Choices], picked: dict[str, int], left: float) -> None:
    """Use up what is left, one step of one layer at a time, largest gain per cost first."""
    while True:
        best, gain = None, 0.0
        for name, i in picked.items():
            cost, harm = choices[name].cost, choices[name].damage
            if i + 1 < len(cost) and cost[i + 1] - cost[i] <= left and harm[i + 1] < harm[i]:
                own = float((harm[i] - harm[i + 1]) / max(cost[i + 1] - cost[i], 1e-12))
                if own > gain:
                    best, gain = name, own
        if best is None:
            return
        cost = choices[best].cost
        left -= float(cost[picked[best] + 1] - cost[picked[best]])
        picked[best] += 1


def between(sizes: Mapping[str, LayerSize], one: Ranks, two: Ranks) -> Ranks:
    """The mean of two shares; parameters grow linearly with the rank, so it costs at most their mean."""

    def as_rank(name: str, rank: int | None) -> float:
        return sizes[name].break_even if rank is None else rank

    return {
        name: size.settle(max(1, int((as_rank(name, one[name]) + as_rank(name, two[name])) / 2)))
        for name, size in sizes.items()
    }


@torch.no_grad()
def divergence(
    task: Task, model: nn.Module, dense: Iterable[Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> float:
    """Mean divergence of the model's answers from the dense ones over the rows; ``dense`` has logits (B, C)."""
    found = [task.divergence(model(**b).logits, z) for z, b in zip(dense, batches, strict=True)]
    return float(torch.cat(found).double().mean())


def scaled(damage: np.ndarray, ranks: Sequence[int], measured: Sequence[float]) -> np.ndarray:
    """Bend a predicted curve (K + 1,) so that it goes through what was measured at some ranks.

    Between them the logarithm of the factor is interpolated, outside it is that of the nearest; the result
    is falling, and 0 at rank K.
    """
    least = 1e-9  # nats: below it a divergence of float32 logits is rounding
    factors = [max(m, least) / max(float(damage[r]), least) for r, m in zip(ranks, measured, strict=True)]
    bent = damage * np.exp(np.interp(np.arange(len(damage)), ranks, np.log(factors)))
    return np.maximum.accumulate(bent[::-1])[::-1]
