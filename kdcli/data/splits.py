"""Which row is learned from and which is measured: kdcli's own split, and what splits have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdcli.data.tables import Located, Rows

ORDER: tuple[str, ...] = ("train", "validation", "test")
_HEAVY = 40  # a text that fills a fortieth of the rows, a quarter of a test split, is kept in train


def keys(rows: Rows) -> list[int]:
    """What equal rows have in common: a hash of 64 bits of their texts without regard to case and white space."""
    texts = rows.first if rows.second is None else map("\x1f".join, zip(rows.first, rows.second, strict=True))
    return [hash(" ".join(text.casefold().split())) for text in texts]


def in_three(part: Located, seed: int, keys: Sequence[int]) -> dict[str, Located]:
    """80/10/10, stratified; each split shuffled, because a file is often sorted by label."""
    shuffled = np.random.default_rng(seed).permutation(len(part.rows))
    role = roles(part.rows.labels or [], seed, keys)[shuffled]
    return {name: part.take(shuffled[role == i]) for i, name in enumerate(ORDER)}


def roles(labels: Sequence[str], seed: int, keys: Sequence[int]) -> np.ndarray:
    """Give each row a role: 0 for eight texts of ten, 1 for one, 2 for one, within every label.

    Rows with equal texts get one role: a text in train and in test would be measured as it was learned. The
    distinct texts are shuffled and sorted by their first label; the position modulo ten is the role, so each
    share is exact to one text overall and within a label. The first text of a label always stays in role 0: a
    label must be in train. So does a text that alone would fill a quarter of a test split.

    Returns:
        Roles, int8 (N,).
    """
    seen: dict[int, int] = {}
    group = np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
    _, first, sizes = np.unique(group, return_index=True, return_counts=True)
    _, codes = np.unique(np.array(labels), return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = shuffled[np.argsort(codes[first][shuffled], kind="stable")]
    place = np.arange(len(first)) % 10
    place[np.diff(codes[first][order], prepend=-1) != 0] = 0
    found = np.zeros(len(first), dtype=np.int8)
    found[order] = np.maximum(place - 7, 0)
    found[(sizes > 1) & (_HEAVY * sizes > len(labels))] = 0
    # Of a text with several labels the first one decided; the others must be in train as well.
    found[group[~np.isin(codes, codes[found[group] == 0])]] = 0
    return found[group]


def findings(splits: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """What is wrong with these splits though each is readable: (code, message), for the report.

    ``split-overlap``: texts that were learned, or chosen on, are measured. ``conflicting-labels``: one text
    has several labels. Texts are compared without regard to case and white space.
    """
    every = {name: keys(splits[name]) for name in ORDER if name in splits}
    shared = []
    for i, (name, part) in enumerate(every.items()):
        for other in list(every)[:i]:
            known = set(every[other])
            if count := sum(key in known for key in part):
                shared.append(f"{count} of the {len(part)} rows of {name} are in {other} too")
    said = f"{'; '.join(shared)}: what is measured on them says less of new texts"
    return [
        *([("split-overlap", said)] if shared else []),
        *conflicts(
            [key for part in every.values() for key in part],
            [label for name in every for label in splits[name].labels or []],
        ),
    ]


def conflicts(keys: Sequence[int], labels: Sequence[str]) -> list[tuple[str, str]]:
    """``conflicting-labels``, where equal rows have different ones."""
    seen: dict[int, str] = {}
    found = {key for key, label in zip(keys, labels, strict=True) if seen.setdefault(key, label) != label}
    texts = "1 text stands" if len(found) == 1 else f"{len(found)} texts stand"
    return [("conflicting-labels", f"{texts} in the data with different labels")] if found else []
