"""Some of many rows: drawn by a seed, every label in proportion.

A file is often sorted, by label or by length, so its first rows tell of one label or of short texts alone. Whoever
looks at some rows only - a search, a calibration, a measurement - takes them from here.
"""

from __future__ import annotations

import numpy as np

from kdcli.inputs.text import Encoded
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

JUDGING_SEED = 0
"""Of the rows that models are judged on: the same for every model and every run, whatever its seed."""


def order(labels: np.ndarray | None, total: int, seed: int) -> np.ndarray:
    """All rows in a random order of which every beginning is a stratified sample.

    A stratum is a label, or what a task has instead (:meth:`kdcli.tasks.task.Task.strata`).

    The first C rows are one of each of the C labels, the most frequent label first; in the first n >= C rows every
    label has its share of n but for rounding, and never none. Of a label the rows are uniformly random. Rows without
    a label (negative) are a stratum like a label, but not promised a place.

    Args:
        labels: (total,); None draws uniformly.
        total: Number of rows.
        seed: The same rows and seed always give the same order.

    Returns:
        A permutation of 0 ... total - 1.
    """
    shuffled = np.random.default_rng(seed).permutation(total)
    if labels is None or not total:
        return shuffled
    drawn = np.asarray(labels)[shuffled]
    _, codes, sizes = np.unique(np.where(drawn < 0, -1, drawn), return_inverse=True, return_counts=True)
    grouped = np.argsort(codes, kind="stable")
    rank = np.empty(total, dtype=np.int64)  # of a row among those of its label
    rank[grouped] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = (rank + 0.5) / sizes[codes]  # every label spread evenly over [0, 1); equals stay shuffled
    first = (rank == 0) & (drawn >= 0)
    place[first] = -sizes[codes[first]]
    return shuffled[np.argsort(place, kind="stable")]


def positions(labels: np.ndarray | None, total: int, count: int, seed: int) -> np.ndarray:
    """``count`` rows, stratified, in their own order; all of them where there are no more.

    Args:
        labels: (total,), negative without a label; None draws uniformly.
        total: Number of rows.
        count: How many are wanted.
        seed: Of the draw.

    Returns:
        Ascending positions.
    """
    if count >= total:
        return np.arange(total)
    return np.sort(order(labels, total, seed)[:count])


def sample(
    rows: Encoded,
    count: int,
    seed: int,
    task: Task = CLASSIFICATION,
) -> Encoded:
    """The same of encoded rows; ``rows`` themselves where there are no more than ``count``."""
    if count >= len(rows):
        return rows
    return rows.take(positions(strata(rows, task), len(rows), count, seed))


def judged(rows: Encoded, count: int, seed: int, task: Task) -> Encoded:
    """The rows at :func:`judged_positions`; ``rows`` themselves where there are no more than ``count``."""
    return rows if count >= len(rows) else rows.take(judged_positions(rows, count, seed, task))


def judged_positions(rows: Encoded, count: int, seed: int, task: Task) -> np.ndarray:
    """Rows to score a model on: as :func:`sample` draws them, but whole queries where rows are ranked.

    Of a few rows of every query there is another ranking, or none at all.
    """
    if rows.queries is None or count >= len(rows):
        return positions(strata(rows, task), len(rows), count, seed)
    return whole_groups(rows.queries, count, seed)


def strata(rows: Encoded, task: Task) -> np.ndarray | None:
    """(N,) groups that a sample should have in their shares; None where there are none."""
    return None if rows.labels is None else task.strata(rows.labels)


def evenly(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` rows, as many of each group as of any other, as far as the groups go.

    Args:
        groups: (N,) numbers of groups, 0 or more.
        count: How many are wanted.
        seed: Of the draw.

    Returns:
        Positions, one of each group after the other.
    """
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    grouped = shuffled[np.argsort(groups[shuffled], kind="stable")]
    sizes = np.bincount(groups)
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a row in its group
    return grouped[np.argsort(rank, kind="stable")[:count]]


def whole_groups(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows of whole groups, drawn at random, as many as fit into ``count`` rows; one group at least.

    Args:
        groups: (N,) numbers of groups.
        count: Rows that are wanted.
        seed: Of the draw.

    Returns:
        Ascending positions.
    """
    names, of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    drawn = np.random.default_rng(seed).permutation(len(names))
    fitting = max(1, int((np.cumsum(sizes[drawn]) <= count).sum()))
    return np.flatnonzero(np.isin(of_row, drawn[:fitting]))
