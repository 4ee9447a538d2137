"""Which inputs of an output projection can go, and what the others must become: least squares from moments.

Shape letters: U input features in groups of ``width`` (a head's features, or one neuron), D outputs. With C the
covariance of the features h, K that of h with the targets t and a ridge r that pulls towards known weights W0,

    W = (K + r W0) (C + r I)^-1        for the inputs that stay; the bias absorbs the means

Removing the inputs S from a least squares solution W over all inputs raises the error by

    tr( W_S ((C + r I)^-1)_SS^-1 W_S^T )                                            (1)

and the best weights of the others become W - W_S ((C + r I)^-1)_SS^-1 ((C + r I)^-1)_S.

Source: Hassibi, Stork 1993, "Optimal Brain Surgeon", NIPS 5, eq. 5 (one weight); Kurtic, Frantar, Alistarh 2023,
"ZipLM", arXiv:2302.04089, eq. 3 and 4 (whole structures, one after the other); Park et al. 2024, "K-prune",
arXiv:2308.03449, section 3.4 (the whole output matrix refitted for what is left).
Differs: features and targets are centred and the bias takes the means; several groups go in one step while many are
left, which changes the order of near ties only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.probe import definite
from kdcli.probe.raw_moments import RawMoments

STEP = 1 / 64  # share of the remaining groups that goes at once


@dataclass(frozen=True)
class Elimination:
    """In which order the groups go, and what that costs."""

    order: list[int]  # groups, first gone first
    error: list[float]  # summed squared error per token when the first k of the order are gone, k = 0 .. all
    weights: dict[int, Tensor]  # k -> (D, U) with zeros where a group is gone, for the k that were asked for


def eliminate(
    covariance: Tensor, weight: Tensor, width: int, *, ridge: float, at: Sequence[int] = ()
) -> Elimination:
    """Remove all groups, the cheapest first by (1), and keep account.

    Args:
        covariance: (U, U) of the features, float64.
        weight: (D, U), the least squares solution over all of them.
        width: Features a group; U is a multiple.
        ridge: Added to the diagonal.
        at: Numbers of removed groups at which the weights of the others are wanted.

    Returns:
        Order, errors and weights.
    """
    size = len(covariance)
    groups = size // width
    inverse = definite.inverse(covariance + ridge * torch.eye(size, dtype=torch.float64))
    now = weight.double().clone()
    alive = torch.arange(groups)
    order: list[int] = []
    error, wanted, kept = [0.0], sorted(set(at), reverse=True), {}
    while True:
        while wanted and wanted[-1] <= len(order):
            whole = torch.zeros(len(weight), size, dtype=torch.float64)
            whole[:, features(alive, width)] = now
            kept[wanted.pop()] = whole
        if not len(alive):
            break
        count = max(1, int(len(alive) * STEP))
        if wanted:
            count = min(count, wanted[-1] - len(order))
        cost = group_costs(inverse, now, width)
        going = torch.argsort(cost, stable=True)[:count].sort().values
        order += alive[going[torch.argsort(cost[going], stable=True)]].tolist()
        columns = features(going, width)
        stay = torch.ones(len(now[0]), dtype=torch.bool)
        stay[columns] = False
        cross = inverse[columns]
        within = inverse[columns][:, columns]
        factor = definite.solve(within, now[:, columns].T).T  # (D, S)
        total = float((factor * now[:, columns]).sum())
        # Within one step the increase is shared out in the proportion of the single costs.
        shares = cost[going].sort().values.cumsum(0)
        shares = shares / shares[-1] if float(shares[-1]) > 0 else torch.ones_like(shares)
        error += [error[-1] + total * float(s) for s in shares]
        now = (now - factor @ cross)[:, stay]
        inverse = (inverse - cross.T @ definite.solve(within, cross))[stay][:, stay]
        remaining = torch.ones(len(alive), dtype=torch.bool)
        remaining[going] = False
        alive = alive[remaining]
    return Elimination(order, error, kept)


def group_costs(inverse: Tensor, weight: Tensor, width: int) -> Tensor:
    """What removing each single group costs by (1): (U, U) and (D, U) to (U / width,)."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=torch.finfo(inverse.dtype).tiny)
    groups = len(inverse) // width
    blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = weight.view(len(weight), groups, width).permute(1, 2, 0)  # (groups, width, D)
    solved = torch.stack([definite.solve(block, part) for block, part in zip(blocks, own, strict=True)])
    return (own * solved).sum((1, 2)).clamp(min=0)


def refit(
    moments: RawMoments, kept: Sequence[int], weight: Tensor, width: int, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Weights (D, kept U) and bias (D,) that give the targets best from the groups that stay.

    Args:
        moments: Over all U features.
        kept: Groups that stay, in their order.
        weight: (D, U), where the ridge pulls to.
        width: Features a group.
        ridge: Share of the mean variance of the features.

    Returns:
        In float64.
    """
    covariance, cross, _ = moments.centred()
    at = features(kept, width)
    h, t = moments.h[at] / moments.count, moments.t / moments.count
    if not len(at):
        return torch.zeros(len(weight), 0, dtype=torch.float64), t
    pull = ridge * moments.scale()
    system = covariance[at][:, at] + pull * torch.eye(len(at), dtype=torch.float64)
    right = cross[at] + pull * weight.double().cpu()[:, at].T
    found = definite.solve(system, right).T
    return found, t - found @ h


def residual_error(moments: RawMoments, kept: Sequence[int], weight: Tensor, width: int) -> float:
    """Summed squared error per token, as a share of the targets' variance, of centred ``weight`` (D, kept U)."""
    covariance, cross, spread = moments.centred()
    at = features(kept, width)
    inside = float((weight @ covariance[at][:, at] * weight).sum()) - 2 * float((weight.T * cross[at]).sum())
    # Targets that vary no more than float32 can tell are met by the bias alone.
    known = spread > definite.ROUNDING**2 * moments.tt / moments.count
    return max(0.0, spread + inside) / spread if known else 0.0


def features(groups: Sequence[int] | Tensor, width: int) -> Tensor:
    """Features of some groups, in their order."""
    at = torch.as_tensor(groups if isinstance(groups, Tensor) else list(groups), dtype=torch.long)
    return (at[:, None] * width + torch.arange(width)).flatten()
