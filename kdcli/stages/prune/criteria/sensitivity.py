r"""Prune every sub-layer where the model's answers suffer least, and refit what is left to the dense model.

1. Curves. For every sub-layer its heads or neurons are removed one after the other, the cheapest first by the
   optimal brain surgeon, until none is left; what stays is refitted at each step (``prune/output_refit.py``). That
   gives the reconstruction error $e(k)$ of the sub-layer with $k$ units gone.
2. Sensitivity. Each sub-layer alone is pruned at several shares of its units and the model's answers are compared
   with the dense ones: the rise is $\mathrm{KL}(\text{dense} \Vert \text{pruned})$ in nats, mean over the rows.
   Between the shares it is a power of $e$, which is known at every $k$: $\log \mathrm{KL}$ is interpolated linearly
   in $\log e$; below the first share it is proportional to $e$. It never falls with $k$.
3. Shares. The numbers of units $k_l$ that minimise, under the budget, the sum of the interpolated rises $\rho_l$ of
   all sub-layers: with a price $\lambda$ of one unit of cost, every sub-layer takes its own minimum

    \min_{k_l}\; \rho_l(k_l) + \lambda\, \text{cost}_l(k_l)

on the lower convex hull of its curve; $\lambda$ is bisected until the budget is met.

4. Cut. From the first layer to the last: curves again, on what the pruned layers below really give, the units that
   stay, and their output matrix by least squares on the dense model's outputs. The linear layers of the head
   likewise.

No labels and no gradients are used.

Source: Frantar, Alistarh 2022, "SPDY", arXiv:2201.13096 (measured sensitivities shared under a cost); Kurtic,
Frantar, Alistarh 2023, "ZipLM", arXiv:2302.04089, section 3.1 (structured optimal brain surgeon and error curves);
the refit of whole output matrices: Park et al. 2024, "K-prune", arXiv:2308.03449, section 3.4.
Differs: the KL of the answers is measured instead of a layer-wise error prior; the targets correct what the pruned
layers below got wrong; a convex hull instead of dynamic programming over coarse levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.families.layer import Layer
from kdcli.probe.layer_stream import FIRST_TOKEN, PARTS, Pair, Stream, add, rows, token_weights
from kdcli.stages.prune import head_refit, output_refit, sublayer_refit
from kdcli.stages.prune.budget import cut_of
from kdcli.stages.prune.criterion import Criterion, UnitJob, UnitsCut, some_rows
from kdcli.stages.prune.output_refit import Elimination, Moments
from kdcli.tasks.task import Task

LEVELS = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1.0)  # shares of a sub-layer's units at which the answers are compared


class Config(BaseModel):
    """Parameters of pruning by sensitivity."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(2048, ge=1, description="training rows whose activations are fitted")
    probes: int = Field(128, ge=1, description="of these rows, those on which the answers are compared")
    batch_size: int = Field(256, ge=1, description="rows per batch; changes speed and memory only")
    ridge: float = Field(
        1e-3, gt=0, description="pull towards the dense weights, a share of the mean variance"
    )
    refit_head: bool = Field(True, description="fit the linear layers of the head as well")


@dataclass(frozen=True)
class SublayerCurve:
    """One sub-layer: what removing k of its units costs the answers and saves."""

    layer: int
    part: str
    rise: np.ndarray  # (units + 1,), nats, for k = 0 .. units; increasing
    saved: np.ndarray  # (units + 1,), in the unit of the job's price


def prune(job: UnitJob, config: Config) -> UnitsCut:
    """Find shares by sensitivity, then cut and refit from the first layer to the last."""
    parts = [p for p in PARTS if p in job.structure.split("+")]
    start = job.price(job.layers)
    if "sensitivity" not in job.memo:
        job.memo["sensitivity"] = sensitivities(job, config, parts)
    curves, table = job.memo["sensitivity"]
    floor = keep_one(curves)
    removed = share_out(curves, job.remove, floor)
    family = job.layers[0].family
    kept = [[np.arange(len(x)) for x in some] for some in (start.heads, start.neurons)]
    pair = Pair(job.model, family, job.layers, job.batches)
    head = head_refit.Head(job.model, family, job.batches) if config.refit_head and job.remove > 0 else None
    steps: list[dict[str, Any]] = []
    with job.progress.task("cut and refit", len(job.layers)) as task:
        for layer in job.layers:
            pair.enter(layer.index)
            for part in PARTS:
                k = removed.get((layer.index, part), 0)
                if not k and not steps:
                    continue  # nothing below changed, so there is nothing to correct
                units = layer.heads if part == "heads" else layer.neurons
                if not units:
                    continue
                moments = pair.moments(layer.index, part)
                gone = _eliminate(layer, part, moments, config, ()).order[:k] if k else []
                stay = sorted(set(range(units)) - set(gone))
                error = sublayer_refit.cut(layer, part, stay, moments, config.ridge)
                side = kept[PARTS.index(part)]
                side[layer.index] = side[layer.index][stay]
                steps.append({"layer": layer.index, "part": part, "removed": k, "error": error})
            pair.leave(layer.index)
            task.advance()
    if head is not None:
        head.refit(pair.pruned, config.ridge)
    return UnitsCut(cut_of(kept, start), steps, {"sensitivity": table})


def sensitivities(
    job: UnitJob, config: Config, parts: Sequence[str]
) -> tuple[list[SublayerCurve], list[dict[str, Any]]]:
    """Curves of all sub-layers of the dense model, and the measured rises for the report.

    Returns:
        One curve a sub-layer with units, and rows {"layer", "part", "removed": share, "kl": nats}.
    """
    family, price = job.layers[0].family, job.price(job.layers)
    stream = Stream(job.model, family, job.layers, job.batches)
    probes = Stream(job.model, family, job.layers, some_rows(job.batches, config.probes))
    dense = list(probes.logits(0))
    curves, table = [], []
    with job.progress.task("sensitivity", len(job.layers) * len(parts)) as task:
        for layer in job.layers:
            moments = _own_moments(stream, layer, layer is job.layers[-1])
            for part in parts:
                units = layer.heads if part == "heads" else layer.neurons
                if units:
                    levels = sorted({max(1, round(units * share)) for share in LEVELS})
                    gone = _eliminate(layer, part, moments[part], config, levels)
                    kl = []
                    for k in levels:
                        weight = gone.weights[k]
                        bias = (moments[part].t - weight @ moments[part].h) / moments[part].count
                        with sublayer_refit.replaced(layer, part, weight, bias):
                            kl.append(_divergence(job.task, dense, probes.logits(layer.index)))
                        table.append({"layer": layer.index, "part": part, "removed": k / units, "kl": kl[-1]})
                    cost = (price.heads if part == "heads" else price.neurons)[layer.index]
                    rise = interpolate(np.array(gone.error), levels, kl)
                    saved = np.concatenate([[0.0], np.cumsum(cost)])
                    curves.append(SublayerCurve(layer.index, part, rise, saved))
                task.advance()
            probes.advance(layer)
    return curves, table


def _own_moments(stream: Stream, layer: Layer, last: bool) -> dict[str, Moments]:
    """Moments of both sub-layers with their own outputs as targets; the stream goes past the layer."""
    found: dict[str, Moments | None] = dict.fromkeys(PARTS)
    states = []
    for number, mask in enumerate(stream.masks):
        weight = token_weights(mask, last, FIRST_TOKEN)
        probes, output = stream.visit(layer, number)
        for part, probe in probes.items():
            found[part] = add(found[part], *rows(probe.features, probe.total - probe.residual, weight))
        assert output is not None
        states.append(output)
    stream.states = states
    return {part: moments for part, moments in found.items() if moments is not None}


def share_out(
    curves: Sequence[SublayerCurve], remove: float, most: Sequence[int] | None = None
) -> dict[tuple[int, str], int]:
    """How many units every sub-layer loses so that together they save ``remove`` at the least total rise.

    Args:
        curves: One a sub-layer.
        remove: In the unit of ``saved``.
        most: The most units that each may lose; all by default.

    Returns:
        (layer, part) -> number of units.
    """
    limits = [len(c.rise) - 1 for c in curves] if most is None else list(most)
    taken = [0] * len(curves)
    if remove <= 0:
        return {(c.layer, c.part): 0 for c in curves}
    steps = []  # (slope, curve, from, to): edges of the lower hulls, steepest saving first
    for number, (curve, limit) in enumerate(zip(curves, limits, strict=True)):
        hull = _lower_hull(curve.saved[: limit + 1], curve.rise[: limit + 1])
        for a, b in itertools.pairwise(hull):
            slope = (curve.rise[b] - curve.rise[a]) / (curve.saved[b] - curve.saved[a])
            steps.append((float(slope), number, int(a), int(b)))
    left = remove * (1 - 1e-9)
    for _, number, a, b in sorted(steps):
        saved = curves[number].saved
        if left <= 0:
            break
        if saved[b] - saved[a] <= left:
            taken[number] = b
        else:  # the last edge is cut where the budget is met
            taken[number] = int(np.searchsorted(saved, saved[a] + left))
        left -= saved[taken[number]] - saved[a]
    return {(c.layer, c.part): k for c, k in zip(curves, taken, strict=True)}


def keep_one(curves: Sequence[SublayerCurve]) -> list[int]:
    """The most units that each sub-layer may lose, so that one head and one neuron of the encoder stay."""
    limits = [len(c.rise) - 1 for c in curves]
    for part in PARTS:
        own = [n for n, c in enumerate(curves) if c.part == part]
        if own:
            best = max(own, key=lambda n: float(curves[n].rise[-1]))
            limits[best] -= 1
    return limits


def _eliminate(
    layer: Layer, part: str, moments: Moments, config: Config, levels: Sequence[int]
) -> Elimination:
    covariance, _, _ = moments.centred()
    width = layer.head_size if part == "heads" else 1
    units = len(covariance) // width
    before, _ = sublayer_refit.matrix(layer, part)
    full, _ = output_refit.refit(moments, range(units), before, width, ridge=config.ridge)
    ridge = config.ridge * moments.scale()
    return output_refit.eliminate(covariance, full, width, ridge=ridge, at=levels)


def interpolate(error: np.ndarray, levels: Sequence[int], kl: Sequence[float]) -> np.ndarray:
    """The rise at every k, a power of the error between the levels and below the first; it never falls.

    Args:
        error: (units + 1,) by the number of units gone.
        levels: Numbers of units gone at which the rise was measured.
        kl: Measured there.
    """
    tiny = 1e-12
    known = np.log(np.maximum(np.maximum.accumulate(np.array(kl)), tiny))
    at = np.log(np.maximum(error, tiny * max(error[-1], tiny)))
    x = at[list(levels)]
    rise = np.exp(np.interp(at, x, known))
    below = at < x[0]
    rise[below] = np.exp(known[0] + at[below] - x[0])  # proportional to the error
    rise[0] = 0.0
    return np.maximum.accumulate(rise)


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points with increasing x (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _divergence(task: Task, dense: Sequence[Tensor], logits: Iterator[Tensor]) -> float:
    total, rows = 0.0, 0
    for before, now in zip(dense, logits, strict=True):
        total += float(task.divergence(now, before, "sum"))
        rows += len(before)
    return max(0.0, total / rows)


METHOD = Criterion(config=Config, prune=prune)
