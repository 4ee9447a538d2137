"""What heads and neurons cost, and which of them to keep under one budget.

Costs are multiply-accumulates (MACs) of one row of T tokens in the encoder's linear layers and attention
products. With plain layers of hidden size d and head size dh they are (Kwon et al. 2022, "A Fast
Post-Training Pruning Framework for Transformers", section 4.1 and its code)

    head    3*T*d*dh + 2*T*T*dh + T*dh*d
    neuron  2*T*d

A layer that was factorised before is cheaper: there d is the rank of the factor that loses the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from kdcli.models.families import Layer
from kdcli.models.layers import LowRankLinear, Projection


@dataclass(frozen=True)
class Units:
    """Something per head and per neuron of every encoder layer: L arrays (H,) and L arrays (F,)."""

    heads: list[np.ndarray]
    neurons: list[np.ndarray]

    def flat(self) -> np.ndarray:
        """All heads, layer by layer, then all neurons: (sum of H + sum of F,)."""
        return np.concatenate([*self.heads, *self.neurons])

    def like(self, flat: np.ndarray) -> Units:
        """Split a flat array the way :meth:`flat` joins this one."""
        parts = np.split(flat, np.cumsum([len(x) for x in (*self.heads, *self.neurons)])[:-1])
        return Units(parts[: len(self.heads)], parts[len(self.heads) :])


def head_macs(layer: Layer, tokens: float) -> float:
    """MACs of one head of ``layer`` for a row of ``tokens`` tokens; 0 when it has none."""
    if not layer.heads:
        return 0.0
    features = sum(_inputs(p) for p in (layer.query, layer.key, layer.value)) + _outputs(layer.attention_output)
    return tokens * layer.head_size * (features + 2 * tokens)


def neuron_macs(layer: Layer, tokens: float) -> float:
    """MACs of one neuron of ``layer`` for a row of ``tokens`` tokens; 0 when it has none."""
    return tokens * (_inputs(layer.ffn_in) + _outputs(layer.ffn_out)) if layer.neurons else 0.0


def costs(layers: Sequence[Layer], tokens: float) -> Units:
    """MACs of every unit for a row of ``tokens`` tokens."""
    return Units(
        [np.full(layer.heads, head_macs(layer, tokens)) for layer in layers],
        [np.full(layer.neurons, neuron_macs(layer, tokens)) for layer in layers],
    )


def layer_macs(layer: Layer, tokens: float) -> float:
    """MACs of one encoder layer for a row of ``tokens`` tokens, also of factors that no unit owns."""
    parts = [layer.query, layer.key, layer.value, layer.attention_output] if layer.heads else []
    parts += [layer.ffn_in, layer.ffn_out] if layer.neurons else []
    weights = sum(p.weight.numel() for part in parts for p in part.modules() if isinstance(p, nn.Linear))
    return tokens * (weights + layer.heads * layer.head_size * 2 * tokens)


def choose(scores: Units, cost: Units, budget: float) -> Units:
    """Keep the units with the most importance per MAC whose costs fit into ``budget``.

    Greedy in the order of score / cost; what no longer fits is passed over, so that cheap units spend the
    remainder. With one kind of unit of one cost this is the exact optimum of the summed score; otherwise it
    misses that optimum by less than the score of one unit, because units are small against the budget.
    Equal ratios are taken in their order. The best head and the best neuron among the candidates stay
    whatever they cost, so that no encoder is emptied.

    Args:
        scores: Importance of every candidate, not negative; an empty array where a layer has none.
        cost: MACs of every candidate, the shapes of ``scores``.
        budget: MACs that the kept candidates may cost together.

    Returns:
        Whether each candidate is kept, as boolean arrays.
    """
    score, price = scores.flat(), cost.flat()
    order = np.argsort(-score / price, kind="stable")
    first_neuron = sum(len(x) for x in scores.heads)
    kept = np.zeros(len(score), dtype=bool)
    for kind in (order[order < first_neuron], order[order >= first_neuron]):
        kept[kind[:1]] = True
    left = budget - float(price[kept].sum())
    slack = 1e-9 * budget  # a budget of all units together must not fail on the last bits of a sum
    for unit in order:
        if not kept[unit] and price[unit] <= left + slack:
            kept[unit] = True
            left -= price[unit]
    return scores.like(kept)


def _inputs(layer: Projection) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else layer.in_features


def _outputs(layer: Projection) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else layer.out_features

