"""Tokens that mean nearly the same: for every token the nearest ones by cosine of its vector."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 1 << 24  # similarities held at once: 64 MB


def nearest(table: Tensor, k: int, groups: np.ndarray) -> np.ndarray:
    """The ``k`` nearest tokens of the same group by cosine similarity, never the token itself.

    Args:
        table: One vector a token, (V, D).
        k: Neighbours of each token, at least 1.
        groups: int (V,), as ``token_groups`` makes them. A token has neighbours in its own group only;
            a negative group is left out: such a token is never proposed and has no neighbours.

    Returns:
        int32 (V, k), the nearest first. Where a token has fewer than ``k`` neighbours the row goes on
        with the token itself, so that any entry may stand in its place.
    """
    found = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], k, axis=1)
    for group in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == group)
        count = min(k, len(members) - 1)
        if count < 1:
            continue
        vectors = F.normalize(table[torch.from_numpy(members).to(table.device)].float(), dim=1)
        block = max(1, _CELLS // len(members))
        for start in range(0, len(members), block):
            part = vectors[start : start + block]
            similarity = part @ vectors.T
            own = torch.arange(len(part), device=part.device)
            similarity[own, own + start] = -torch.inf
            best = similarity.topk(count, dim=1).indices.cpu().numpy()
            found[members[start : start + block], :count] = members[best]
    return found


def token_groups(
    tokens: Sequence[str], special: Collection[int], allowed: np.ndarray | None = None
) -> np.ndarray:
    """Which tokens may stand for each other: whole words or word starts (0), continuations (1), none (-1).

    Args:
        tokens: The vocabulary in the order of its ids, V entries.
        special: Ids of special tokens; they and ``[unused...]`` entries get -1.
        allowed: bool (V,); tokens that are False get -1. None allows all.

    Returns:
        int8 (V,). A continuation starts with ``##`` (WordPiece). In a vocabulary that marks word starts
        instead (``Ġ`` of byte-level BPE, ``▁`` of SentencePiece) the tokens without the mark are the
        continuations.
    """
    marks = [token[:1] in ("Ġ", "▁") for token in tokens]
    if sum(marks) > len(tokens) // 10:
        inside = np.array([not mark for mark in marks], dtype=bool)
    else:
        inside = np.array([token.startswith("##") for token in tokens], dtype=bool)
    groups = inside.astype(np.int8)
    unused = np.array([token.startswith("[unused") for token in tokens], dtype=bool)
    groups[unused] = -1
    groups[np.fromiter(special, dtype=np.int64, count=len(special))] = -1
    if allowed is not None:
        groups[~allowed] = -1
    return groups
