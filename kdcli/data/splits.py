"""Which row is learned from and which is measured: kdcli's own split, and what splits have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from kdcli.data.tables import Label, Located, Rows
from kdcli.errors import InputError

ORDER: tuple[str, ...] = ("train", "validation", "test")
_FEWEST_QUERIES = 10
_HEAVY = 40  # a text that fills a fortieth of the rows, a quarter of a test split, is kept in train


_QUANTILES = 10  # strata of numbers


def keys(rows: Rows) -> list[int]:
    """What equal rows have in common: a hash of 64 bits of their texts, and of their query, without regard to case
    and white space.
    """
    columns = [column for column in (rows.first, rows.second, rows.queries) if column is not None]
    return [
        hash(_plain(texts[0] if len(texts) == 1 else "\x1f".join(texts)))
        for texts in zip(*columns, strict=True)
    ]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def names(labels: Iterable[Label]) -> Iterator[str]:
    """Every label name of these rows, repeated as often as it stands there; numbers have none."""
    for label in labels:
        if isinstance(label, tuple):
            yield from label
        elif isinstance(label, str):
            yield label


def strata(labels: Sequence[Label]) -> np.ndarray:
    """What rows are split and sampled by, (N,): the label; of several the rarest; of a number the tenth it lies in."""
    if labels and isinstance(labels[0], tuple):
        counts = Counter(names(labels))
        rank = {label: i for i, label in enumerate(sorted(counts, key=lambda x: (counts[x], x)), 1)}
        return np.array([min((rank[x] for x in names([row])), default=0) for row in labels])
    found = np.array(labels)
    if labels and isinstance(labels[0], float):
        edges = np.quantile(found, np.arange(1, _QUANTILES) / _QUANTILES)
        return np.searchsorted(np.unique(edges), found, side="right")
    return found


def in_three(part: Located, seed: int, keys: Sequence[int]) -> dict[str, Located]:
    """80/10/10, stratified; each split shuffled, because a file is often sorted by label."""
    shuffled = np.random.default_rng(seed).permutation(len(part.rows))
    role = roles_of(part, seed, keys)[shuffled]
    return {name: part.take(shuffled[role == i]) for i, name in enumerate(ORDER)}


def roles_of(part: Located, seed: int, keys: Sequence[int]) -> np.ndarray:
    """The same roles as :func:`roles` for rows of any kind, int8 (N,).

    The rows of a query have one role, and so have rows with equal texts. Each label that a row can have is in role 0.

    Raises:
        InputError: There are too few queries.
    """
    labels = part.rows.labels or []
    if (few := too_few_queries(part.rows)) is not None:
        raise InputError(
            f"'{part.source}' has rows of {few} queries; those of one query stay in one split, which needs "
            f"{_FEWEST_QUERIES} queries",
            "split them by hand: a directory with train, validation and test",
        )
    if part.rows.queries is not None:
        distinct, of_row = np.unique([_plain(query) for query in part.rows.queries], return_inverse=True)
        place = np.random.default_rng(seed).permutation(len(distinct)) % 10
        return np.maximum(place - 7, 0).astype(np.int8)[of_row]
    found = roles(strata(labels), seed, keys)
    if part.kind == "any-of":
        learned = set(names(label for label, role in zip(labels, found, strict=True) if role == 0))
        lost = {
            key for key, label in zip(keys, labels, strict=True) if not learned.issuperset(names([label]))
        }
        found[[key in lost for key in keys]] = 0
    return found


def too_few_queries(rows: Rows) -> int | None:
    """The number of distinct queries where there are too few of them to be split; None for rows without queries."""
    count = _FEWEST_QUERIES if rows.queries is None else len(set(map(_plain, rows.queries)))
    return count if count < _FEWEST_QUERIES else None


def roles(labels: Sequence[str] | np.ndarray, seed: int, keys: Sequence[int]) -> np.ndarray:
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


def conflicts(keys: Sequence[int], labels: Sequence[Label]) -> list[tuple[str, str]]:
    """``conflicting-labels``, where equal rows have different ones."""
    seen: dict[int, Label] = {}
    found = {key for key, label in zip(keys, labels, strict=True) if seen.setdefault(key, label) != label}
    texts = "1 text stands" if len(found) == 1 else f"{len(found)} texts stand"
    return [("conflicting-labels", f"{texts} in the data with different labels")] if found else []
