"""Which weights stay: the lowest scores go, in exact numbers, over a model, a matrix, a row or N of M neighbours.

Shape letters: O output features, I input features. A weight that is zero already has the lowest score of
all, so that it goes first and pruning a pruned model goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kdcli.stages.prune.criterion import Pattern

Scope = Literal["global", "layer", "row"]


def keep(
    scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], pattern: Pattern, scope: Scope
) -> dict[str, Tensor]:
    """Which weights stay.

    Of equal scores at the limit the earlier ones go: matrices in their order, each row by row.

    Args:
        scores: Importance (O, I) of the weights of every matrix, any real numbers.
        weights: The matrices (O, I), of the same names; only where they are zero counts.
        pattern: A share, or N of M neighbours; see :func:`n_of_m`.
        scope: Over what the share is taken; without effect on N of M.

    Returns:
        Boolean tensors of the same names, shapes and devices; False where a weight goes.
    """
    ranked = {name: s.detach().masked_fill(weights[name] == 0, -torch.inf) for name, s in scores.items()}
    if pattern.m:
        return {name: n_of_m(s, pattern.n, pattern.m) for name, s in ranked.items()}
    if scope == "row":
        return {name: rows(s, round(pattern.sparsity * s.shape[1])) for name, s in ranked.items()}
    if scope == "layer":
        return {name: largest(s, round(pattern.sparsity * s.numel())) for name, s in ranked.items()}
    whole = torch.cat([s.flatten().cpu() for s in ranked.values()])
    flat = largest(whole, round(pattern.sparsity * len(whole))).split([s.numel() for s in ranked.values()])
    return {n: part.view(s.shape).to(s.device) for (n, s), part in zip(ranked.items(), flat, strict=True)}


def largest(scores: Tensor, lose: int) -> Tensor:
    """All but the ``lose`` lowest scores of a tensor of any shape."""
    if lose == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten().cpu()  # where selecting the k-th value is deterministic
    limit = flat.kthvalue(lose).values
    kept = flat > limit
    surplus = len(kept) - int(kept.sum()) - lose  # equal to the limit, and one too many
    if surplus:
        kept[torch.nonzero(flat == limit)[-surplus:, 0]] = True
    return kept.view(scores.shape).to(scores.device)


def rows(scores: Tensor, lose: int) -> Tensor:
    """All but the ``lose`` lowest scores of every row of (..., I)."""
    order = torch.argsort(scores, dim=-1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order[..., :lose], False)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The N highest scores of every M neighbours along the input; of a rest of fewer than M all stay.

    Args:
        scores: (O, I).
        n: How many stay.
        m: Of how many.
    """
    whole = scores.shape[1] // m * m
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[:, :whole] = rows(scores[:, :whole].unflatten(1, (-1, m)), m - n).flatten(1)
    return kept
