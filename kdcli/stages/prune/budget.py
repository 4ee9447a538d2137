"""What heads and neurons cost, which of them to keep under one budget, and the search that cuts the others.

Costs are multiply-accumulates (MACs) of one row of T tokens in the encoder's linear layers and attention
products. With plain layers of hidden size d and head size dh they are (Kwon et al. 2022, "A Fast
Post-Training Pruning Framework for Transformers", section 4.1 and its code)

    head    3*T*d*dh + 2*T*T*dh + T*dh*d
    neuron  2*T*d

A layer that was factorised before is cheaper: there d is the rank of the factor that loses the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from kdcli.errors import InputError, UsageError
from kdcli.families.layer import Layer
from kdcli.families.modules import LowRankLinear, Projection
from kdcli.models import transforms
from kdcli.models.transforms import Cut
from kdcli.stages.prune.criterion import UnitJob, Units, UnitsCut


def head_macs(layer: Layer, tokens: float) -> float:
    """MACs of one head of ``layer`` for a row of ``tokens`` tokens; 0 when it has none."""
    if not layer.heads:
        return 0.0
    features = sum(_inputs(p) for p in (layer.query, layer.key, layer.value)) + _outputs(
        layer.attention_output
    )
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


def macs_at_width(layers: Sequence[Layer], tokens: float, width: int) -> float:
    """MACs that :func:`layer_macs` would find in all layers together at a residual stream of ``width`` features."""
    total = 0.0
    for layer in layers:
        readers = [layer.query, layer.key, layer.value] if layer.heads else []
        readers += [layer.ffn_in] if layer.neurons else []
        writers = [layer.attention_output] if layer.heads else []
        writers += [layer.ffn_out] if layer.neurons else []
        now = sum(r.in_features * _outer(r, 0) for r in readers) + sum(
            w.out_features * _outer(w, 1) for w in writers
        )
        then = sum(width * _outer(r, 0) for r in readers) + sum(width * _outer(w, 1) for w in writers)
        total += layer_macs(layer, tokens) + tokens * (then - now)
    return total


def table_row(layer: Layer, tokens: float, when: str) -> dict[str, Any]:
    """Sizes of one layer for the report's table; ``when`` is ``before`` or ``after``."""
    return {
        "layer": layer.index,
        f"heads_{when}": layer.heads,
        f"neurons_{when}": layer.neurons,
        f"macs_{when}": round(layer_macs(layer, tokens)),
    }


def macs_to_remove(
    layers: Sequence[Layer],
    structure: str,
    tokens: float,
    *,
    sparsity: float | None = None,
    budget: float | None = None,
) -> float:
    """MACs of a row of ``tokens`` tokens that pruning must save.

    Args:
        layers: The encoder as it is before pruning.
        structure: Which units may go.
        tokens: T.
        sparsity: Share of the MACs of those units that goes, in [0, 1).
        budget: Share of all MACs of the encoder that stays, in (0, 1]; used when ``sparsity`` is None.

    Raises:
        InputError: The encoder has no such units.
        UsageError: The budget cannot be met even without any of those units.
    """
    prunable = float(costs(layers, tokens).only(structure).flat().sum())
    if not prunable:
        raise InputError(f"the model's encoder has no {structure} left to prune")
    if sparsity is not None:
        return sparsity * prunable
    assert budget is not None
    dense = sum(layer_macs(layer, tokens) for layer in layers)
    if (1 - budget) * dense > prunable * (1 + 1e-9):
        share = prunable / dense
        raise UsageError(
            f"--budget {budget} cannot be met by removing {structure}: they are {share:.1%} of the encoder's "
            f"multiply-accumulates, so at least {1 - share:.1%} stay",
            "give a larger budget" + ("" if "+" in structure else ", or prune heads+neurons"),
        )
    return (1 - budget) * dense


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


def search(
    job: UnitJob,
    estimate: Callable[[], tuple[Units, float | None]],
    steps: int,
    pick: Callable[[Units, Units, float], Units] = choose,
) -> UnitsCut:
    """Cut the least important units out of a model, in place, until what they cost is gone.

    Every step estimates the importance of what is left and removes an equal part of the cost. One step is
    the one-shot schedule.

    Args:
        job: The model and what has to go.
        estimate: Gives the scores of all units that the model has now, and its loss where it has one.
        steps: At least 1.
        pick: Which units stay, from their scores, their costs and a budget.

    Returns:
        The cut, and for each step the loss before it and the units left after it.
    """
    start = job.price(job.layers)
    prunable = float(start.only(job.structure).flat().sum())
    kept = [[np.arange(len(x)) for x in part] for part in (start.heads, start.neurons)]
    trace: list[dict[str, Any]] = []
    for step in range(1, steps + 1 if job.remove > 0 else 1):
        scores, loss = estimate()
        budget = prunable - job.remove * step / steps
        chosen = pick(scores.only(job.structure), job.price(job.layers).only(job.structure), budget)
        now = [
            {i: np.flatnonzero(x).tolist() for i, x in enumerate(part) if not x.all()}
            for part in (chosen.heads, chosen.neurons)
        ]
        transforms.apply(job.model, Cut(heads=now[0], neurons=now[1]))
        for part, cut in zip(kept, now, strict=True):
            for i, units in cut.items():
                part[i] = part[i][units]
        heads, neurons = (sum(len(x) for x in part) for part in kept)
        trace.append({"loss": loss, "heads": heads, "neurons": neurons})
    return UnitsCut(cut_of(kept, start), trace)


def cut_of(kept: Sequence[Sequence[np.ndarray]], start: Units) -> Cut:
    """The cut that keeps these heads and neurons of every layer, in the numbering of ``start``."""
    whole = [
        {i: x.tolist() for i, x in enumerate(part) if len(x) < len(had[i])}
        for part, had in zip(kept, (start.heads, start.neurons), strict=True)
    ]
    return Cut(heads=whole[0], neurons=whole[1])


def _inputs(layer: Projection) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else layer.in_features


def _outputs(layer: Projection) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else layer.out_features


def _outer(layer: Projection, side: int) -> int:
    """Weights that each feature of the residual stream has in a layer that reads (0) or writes (1) it."""
    if isinstance(layer, LowRankLinear):
        return layer.rank
    return layer.in_features if side else layer.out_features
