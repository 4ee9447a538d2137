r"""Fisher pruning without training: a search over masks, a rearrangement, and masks tuned by least squares.

Shape letters: $N$ rows, $L$ layers, $H$ heads and $F$ neurons of a layer, $U$ either of them, $O$ outputs.

With gates $c$ on all heads and neurons (see ``taylor``) and $g_n$ (U,) the gradient of row $n$'s loss, the loss at a
mask $m$ is to second order, at a trained model,

    L(m) - L(1) \approx \tfrac12 (1 - m)^\top I\, (1 - m), \qquad I = \frac{1}{N} \sum_n g_n g_n^\top

with $I$ the empirical Fisher information.

1. Search. With the diagonal of $I$, pruned units add up. For every number of heads the best heads are taken, and
   with the MACs that they leave the best neurons; the pair with the most importance wins.
2. Rearrangement. With the block of $I$ of every attention and feed-forward part, at the number of units that the
   search gave it: every unit that stays, the least important first, joins the pruned ones, and that one comes
   back without which $g^\top g$ of the pruned is smallest.
3. Tuning. Part by part, first to last, the mask of the units that stay is what brings the part's output closest
   to that of the dense model, damped towards 1, by least squares over the real tokens $t$:

    \min_m \sum_t \lVert W\, \mathrm{diag}(m)\, h_t + b - y_t \rVert^2
    + \text{damp} \cdot \overline{\mathrm{diag}\, A}\, \lVert m - 1 \rVert^2,
    \qquad A = (W^\top W) \odot \sum_t h_t h_t^\top

summed over the features of a head; in the last layer tokens behind the first count a tenth, because the head reads
the first alone. $m$ is folded into the columns of $W$, so that it costs nothing afterwards.

Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv:2204.09656, sections
4.1 to 4.3 and algorithm 1.
Differs: gradients are of single rows, where the code squares those of batch means, in which rows of opposite sign
cancel. Prices may be milliseconds and uneven: units are ordered by importance per price, and what is left over is
spent on units that still fit. With the iterative schedule the first two steps are repeated on the pruned model.
Tuning aims at the dense model and not at one pruned half way. The bias stays: moved to the targets' mean, it lost a
point on MiniLM and CLINC150 at half of the MACs, where masks alone gain 0.4. It is solved directly, with a damping
that does not depend on the number of tokens (the source stops LSMR on the normal equations early). Values that leave
a range are damped ten times as strongly, up to three times; only when that does not help nothing more is tuned, as in
the source at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.families.modules import LowRankLinear, Projection
from kdcli.inputs.feeding import Labelled
from kdcli.probe import definite
from kdcli.probe.layer_stream import PARTS, Moments, Pair
from kdcli.stages.prune.budget import search
from kdcli.stages.prune.criteria import taylor
from kdcli.stages.prune.criterion import Criterion, UnitJob, Units, UnitsCut

DAMPINGS = 4  # that are tried, each ten times the one before


class Config(BaseModel):
    """Parameters of Fisher pruning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=1, description="training rows that masks are found and tuned on")
    steps: int = Field(8, ge=1, description="estimates of the iterative schedule, each followed by a cut")
    rearrange: bool = Field(
        True, description="exchange units in every part by its block of the Fisher matrix"
    )
    tune: bool = Field(True, description="scale the units that stay so that every part gives what it gave")
    damp: float = Field(1.0, gt=0, description="how strongly tuned masks are held at 1")
    limit: float = Field(10.0, gt=1, description="largest size of a tuned mask; beyond it the damping rises")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the scores")


def allocate(scores: Units, cost: Units, budget: float) -> Units:
    """Keep the heads and neurons with the most importance together whose costs fit into ``budget``.

    Both kinds are ordered by importance per cost. For every number of the first heads the number of the first
    neurons that fit is looked up in their running sum; what is left over goes to units, in the same order, that
    still fit. With one price for all heads and one for all neurons that is the best mask there is.

    Args:
        scores: Importance of each unit, not negative.
        cost: Price of each unit, positive.
        budget: Price that those that stay may have together. The first head and the first neuron stay anyway.

    Returns:
        Whether each unit stays, as boolean arrays.
    """
    score, price = scores.flat(), cost.flat()
    order = np.argsort(-score / price, kind="stable")
    first_neuron = sum(len(x) for x in scores.heads)
    heads, neurons = order[order < first_neuron], order[order >= first_neuron]
    slack = 1e-9 * abs(budget)  # a budget of all units together must not fail on the last bits of a sum
    counts = np.arange(min(1, len(heads)), len(heads) + 1)
    room = budget - _running(price[heads])[counts] + slack
    fitting = np.searchsorted(_running(price[neurons]), room, side="right") - 1
    fitting = fitting.clip(min(1, len(neurons)))
    fits = room >= _running(price[neurons])[fitting]
    if not fits.any():  # not even the first of each: they stay
        fits[0] = True
    total = _running(score[heads])[counts] + _running(score[neurons])[fitting]
    best = int(np.argmax(np.where(fits, total, -np.inf)))
    kept = np.zeros(len(score), dtype=bool)
    kept[heads[: counts[best]]] = True
    kept[neurons[: fitting[best]]] = True
    left = budget - float(price[kept].sum()) + slack
    for unit in order[~kept[order] & (price[order] <= left)]:
        if price[unit] <= left:
            kept[unit] = True
            left -= price[unit]
    return scores.like(kept)


def rearrange(fisher: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Exchange units between kept and pruned so that 1_P^T I 1_P of the pruned P falls; their number stays.

    Args:
        fisher: I, (U, U), symmetric, up to a factor.
        kept: (U,) bool.

    Returns:
        (U,) bool.
    """
    kept = kept.copy()
    diagonal = fisher.diagonal()
    if kept.all() or not kept.any():
        return kept
    pruned = np.flatnonzero(~kept)
    sums = fisher[pruned].sum(0)  # I 1_P, kept up to date: an exchange is O(U)
    for unit in np.flatnonzero(kept)[np.argsort(diagonal[kept], kind="stable")]:
        joined = np.append(pruned, unit)
        sums += fisher[unit]
        # Without i the value falls by 2 (I 1_P)_i - I_ii.
        back = int(np.argmax(2 * sums[joined] - diagonal[joined]))
        sums -= fisher[joined[back]]
        pruned = np.delete(joined, back)
    kept[:] = True
    kept[pruned] = False
    return kept


def normal_equations(
    moments: Moments, weight: Tensor, bias: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """A and b of the least squares problem A m = b for the masks of one part.

    Args:
        moments: Of its features h (U,) and targets (O,).
        weight: W, (O, U).
        bias: (O,), which stays as it is.
        width: Features that share one mask.

    Returns:
        A (U / width, U / width) and b (U / width,), per token, float64.
    """
    second, cross = moments.hh / moments.count, moments.ht / moments.count
    if bias is not None:
        cross = cross - torch.outer(moments.h / moments.count, bias)
    units = len(second) // width
    gram = ((weight.T @ weight) * second).view(units, width, units, width).sum((1, 3))
    return gram, (weight * cross.T).sum(0).view(units, width).sum(1)


def solve(gram: Tensor, right: Tensor, damp: float) -> Tensor:
    """The mask m of A m = b that is held at 1: (A + r I)(m - 1) = b - A 1, r = ``damp`` times the mean of A's diagonal.

    A unit that never speaks (a zero row of A and b) keeps 1.
    """
    ridge = damp * max(float(gram.diagonal().mean()), 1e-30)
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return 1 + definite.solve(system, right - gram.sum(1))


@torch.no_grad()
def tune(pair: Pair, config: Config, structure: str) -> dict[str, Any]:
    """Tune the masks of the pruned model of ``pair`` from its first part to its last, and fold them in.

    Args:
        pair: The pruned model and the one it came from, both in front of the first layer; moved to the end.
        config: Damping and limit.
        structure: The kinds that are tuned.

    Returns:
        For the report: how many parts were tuned, the mask furthest from 1, and where it stopped, if it did.
    """
    tuned, furthest = 0, 1.0
    for index, layer in enumerate(pair.layers):
        pair.enter(index)
        for part in PARTS:
            if part not in structure.split("+") or not (layer.heads if part == "heads" else layer.neurons):
                continue
            output = layer.attention_output if part == "heads" else layer.ffn_out
            width = layer.head_size if part == "heads" else 1
            moments = pair.moments(index, part)
            weight = _matrix(output)
            bias = None if output.bias is None else output.bias.cpu().double()
            problem = normal_equations(moments, weight, bias, width)
            tries = (solve(*problem, config.damp * 10**power) for power in range(DAMPINGS))
            mask = next(
                (m for m in tries if float(m.abs().nan_to_num(torch.inf).max()) <= config.limit), None
            )
            if mask is None:
                return _detail(tuned, furthest) | {"stopped_at": {"layer": index, "part": part}}
            _fold(output, mask.repeat_interleave(width))
            tuned += 1
            furthest = max(furthest, float(mask[(mask - 1).abs().argmax()]), key=lambda x: abs(x - 1))
        pair.leave(index)
    return _detail(tuned, furthest)


def prune(job: UnitJob, config: Config) -> UnitsCut:
    """Find the mask, cut, and tune what is left."""
    steps = config.steps if job.iterative else 1
    pair = None
    if config.tune and job.remove > 0:
        pair = Pair(job.model, job.layers[0].family, job.layers, job.batches)
    rows: Units | None = None
    with job.progress.task("importance", steps * len(job.batches)) as task:

        def counted() -> Iterator[Labelled]:
            for batch in job.batches:
                yield batch
                task.advance()

        def estimate() -> tuple[Units, float]:
            nonlocal rows
            rows, loss = gate_gradients(job, counted())
            sums = [
                [np.square(g).sum(0, dtype=np.float64) for g in part] for part in (rows.heads, rows.neurons)
            ]
            return Units(*sums), loss

        def pick(scores: Units, cost: Units, budget: float) -> Units:
            found = allocate(scores, cost, budget)
            assert rows is not None
            if config.rearrange:
                for part, gradients in ((found.heads, rows.heads), (found.neurons, rows.neurons)):
                    for i, kept in enumerate(part):
                        if len(kept) and not kept.all():
                            g = gradients[i].astype(np.float64)
                            part[i] = rearrange(g.T @ g, kept)
            return found

        found = search(job, estimate, steps, pick)
    if pair is not None:
        found.detail["tuning"] = tune(pair, config, job.structure)
    return found


def gate_gradients(job: UnitJob, batches: Iterator[Labelled]) -> tuple[Units, float]:
    """Gradient of every row's loss with respect to every gate, L of (N, H) and L of (N, F), and the mean loss.

    They take 4 bytes a row and unit: the number of rows is what the configuration says, not that of the data.
    """
    parts: list[list[list[np.ndarray]]] = [[[] for _ in job.layers] for _ in range(2)]
    total, rows = 0.0, 0
    for loss, found in taylor.row_gradients(job.model, job.layers, batches, job.task):
        for kept, new in zip(parts, (found.heads, found.neurons), strict=True):
            for layer, gradient in zip(kept, new, strict=True):
                layer.append(gradient.float().cpu().numpy())
        total, rows = total + loss, rows + len(found.heads[0])
    heads, neurons = ([np.concatenate(layer) for layer in part] for part in parts)
    return Units(heads, neurons), total / rows


def _running(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _matrix(output: Projection) -> Tensor:
    if isinstance(output, LowRankLinear):
        return output.second.weight.cpu().double() @ output.first.weight.cpu().double()
    return output.weight.cpu().double()  # where the moments are


def _fold(output: Projection, mask: Tensor) -> None:
    """Scale the columns of an output projection."""
    reads = output.first if isinstance(output, LowRankLinear) else output
    reads.weight.mul_(mask.to(reads.weight))


def _detail(tuned: int, furthest: float) -> dict[str, Any]:
    return {"parts": tuned, "furthest_from_one": furthest}


METHOD = Criterion(config=Config, prune=prune)
