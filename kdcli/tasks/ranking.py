"""How well numbers order rows: rank correlation, pairs, the metrics of rankings, and each row's influence on them.

Shape letter: N rows. Everything takes O(N log N) or O(N log^2 N), so that a hundred thousand rows are no trouble.
"""

from __future__ import annotations

import numpy as np

from kdcli.tasks import intervals
from kdcli.tasks.intervals import Statistic, ratio

CUT = 10
"""NDCG and MRR look at this many first ranks."""


def spearman(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Spearman's correlation of x and y (N,), equal values at their mean rank; 0 where either is constant.

    With a and b the ranks as shares in [0, 1], rho = cov(a, b) / sqrt(var a var b). A row changes it by its own term
    and by moving the ranks of all rows above it; the influence function has both.
    """
    n = len(x)
    a, b = shares(x), shares(y)
    # The mean of a is 1/2 whatever the weights, so moments about 0 are enough.
    ab, aa, bb = (float((p * q).mean()) for p, q in ((a, b), (a, a), (b, b)))
    cov, va, vb = ab - 0.25, aa - 0.25, bb - 0.25
    if min(va, vb) < 1e-12:
        return intervals.linear(0.0, np.zeros(n))
    d_ab = a * b + _moved(x, b) + _moved(y, a) - 3 * ab
    d_aa = a * a + 2 * _moved(x, a) - 3 * aa
    d_bb = b * b + 2 * _moved(y, b) - 3 * bb
    rho = float(np.clip(cov / np.sqrt(va * vb), -1.0, 1.0))
    influence = (d_ab / np.sqrt(va * vb) - rho / 2 * (d_aa / va + d_bb / vb)) / n
    return intervals.correlation(rho, influence)


def shares(x: np.ndarray) -> np.ndarray:
    """(N,) the share of rows below each value, those equal to it counted half: mid-ranks in (0, 1)."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts / 2) / len(x))[where]


def _moved(x: np.ndarray, f: np.ndarray) -> np.ndarray:
    """(N,) the mean over all rows of f where their x is larger than this row's, f / 2 where it is equal."""
    _, where = np.unique(x, return_inverse=True)
    of = np.bincount(where, weights=f)
    return ((np.cumsum(of[::-1])[::-1] - of / 2) / len(x))[where]


def pair_order(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Of the pairs of rows that differ in y, the share that x puts in the same order, equal x counted half.

    0.5 for a constant x and for chance; for two values of y it is the area under the ROC curve. 0.5 without a pair.
    Source: Harrell et al. 1982 (the concordance index); its influence function is the projection of a U-statistic
    (Hoeffding 1948).
    """
    n = len(x)
    signed = (
        _below(x, y) + _below(-x, -y) - _below(x, -y) - _below(-x, y)
    )  # (N,) concordant minus discordant pairs
    _, where, counts = np.unique(y, return_inverse=True, return_counts=True)
    different = n - counts[where]  # (N,) rows that differ in y
    pairs = different.sum()
    if pairs == 0:
        return intervals.linear(0.5, np.zeros(n))
    excess = signed.sum() / pairs
    return intervals.linear(0.5 + excess / 2, (signed - excess * different) / pairs)


def same_order(x: np.ndarray, y: np.ndarray) -> float:
    """Share of all pairs of rows that x and y put in the same order or both call equal; equal in one alone counts half.

    1 for one row.
    """
    n = len(x)
    if n < 2:
        return 1.0
    excess = float(_below(x, y).sum() - _below(x, -y).sum())  # concordant minus discordant pairs
    _, counts = np.unique(np.stack([x, y], 1), axis=0, return_counts=True)
    equal = float((counts * (counts - 1) / 2).sum())
    pairs = n * (n - 1) / 2
    return (pairs + excess + equal) / (2 * pairs)


def _below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) how many rows have both a smaller x and a smaller y.

    Rows in the order of x, bit for bit of the ranks of y: two ranks with equal higher bits are ordered by the first
    one that differs, so at each bit a row with a 1 counts the rows before it that share the higher bits and have a 0.
    """
    rank = np.unique(y, return_inverse=True)[1]
    # Of equal x the largest y comes first, so that none of them counts another.
    order = np.lexsort((-rank, x))
    r = rank[order]
    found = np.zeros(len(r), np.int64)
    for bit in range(int(r.max(initial=0)).bit_length()):
        together = np.argsort(r >> (bit + 1), kind="stable")
        high, one = r[together] >> (bit + 1), (r[together] >> bit) & 1
        zeros = np.cumsum(1 - one)
        start = np.flatnonzero(np.append(True, high[1:] != high[:-1]))
        before = np.append(0, zeros)[start]  # zeros before the group
        group = np.cumsum(np.append(False, high[1:] != high[:-1]))
        found[together] += one * (zeros - before[group])
    counts = np.empty_like(found)
    counts[order] = found
    return counts


def ndcg(scores: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Statistic:
    """Mean over queries of DCG / ideal DCG at the first 10 ranks, with the label as gain.

    Rows with equal scores share the mean gain of their ranks, as in scikit-learn's ``ndcg_score``: the order of the
    rows of a file plays no part. A negative label is a gain of 0. Queries with one row or without a label above 0 are
    left out: every order of them is as good (scikit-learn refuses the first and counts the second as 0).

    Source: Järvelin and Kekäläinen 2002; McSherry and Najork 2008, section 2.3 (equal scores).
    """
    gains = np.maximum(labels.astype(np.float64), 0.0)
    where, counted = judged(gains, queries)
    dcg, ideal = _dcg(scores, gains, where), _dcg(gains, gains, where)
    return _over_queries(ratio(dcg, ideal), where, counted)


def mrr(scores: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Statistic:
    """Mean over queries of 1 / rank of the first row with a label above 0, 0 where that is below rank 10.

    Rows with equal scores stand in random order, and it is the expected value: a model that gives every row one score
    gains nothing from a file that lists the right rows first. Queries are left out as by :func:`ndcg`.

    Source: Craswell 2009; McSherry and Najork 2008, section 2.5 (equal scores).
    """
    relevant = labels > 0
    where, counted = judged(relevant, queries)
    order = np.lexsort((-scores, where))
    q, s, y = where[order], scores[order], relevant[order]
    new_query = np.append(True, q[1:] != q[:-1])
    new = new_query | np.append(True, s[1:] != s[:-1])
    start = np.flatnonzero(new)  # of each group of equal scores
    size = np.diff(np.append(start, len(q)))
    hits = np.add.reduceat(y.astype(np.int64), start)
    above = start - np.flatnonzero(new_query)[q[start]]  # rows of the query with a higher score
    right = np.flatnonzero(hits)
    of, first = np.unique(q[start[right]], return_index=True)
    value = np.zeros(len(counted))
    for query, group in zip(of, right[first], strict=True):
        value[query] = _expected_reciprocal(int(above[group]), int(size[group]), int(hits[group]))
    return _over_queries(value, where, counted)


def judged(gains: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) of the rows' queries from 0, and whether each of these Q queries can be ordered well or badly."""
    _, where, rows = np.unique(queries, return_inverse=True, return_counts=True)
    return where, (rows > 1) & (np.bincount(where, weights=gains > 0) > 0)


def _dcg(scores: np.ndarray, gains: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(Q,) sums of gain / log2(1 + rank) over the first ranks, equal scores with the mean of their ranks' discounts."""
    order = np.lexsort((-scores, where))
    q, s, g = where[order], scores[order], gains[order]
    new_query = np.append(True, q[1:] != q[:-1])
    rank = np.arange(len(q)) - np.flatnonzero(new_query)[q]
    discount = np.where(rank < CUT, 1 / np.log2(rank + 2), 0.0)
    group = np.cumsum(new_query | np.append(True, s[1:] != s[:-1])) - 1
    shared = (np.bincount(group, weights=discount) / np.bincount(group))[group]
    return np.bincount(q, weights=g * shared)


def _expected_reciprocal(above: int, size: int, hits: int) -> float:
    """Mean of 1 / rank of the first of ``hits`` right rows among ``size`` in random order, below ``above`` others."""
    value, none_yet = 0.0, 1.0  # probability that no right row came before this place
    for place in range(min(size - hits + 1, CUT - above)):
        now = hits / (size - place)
        value += none_yet * now / (above + place + 1)
        none_yet *= 1 - now
    return value


def _over_queries(values: np.ndarray, where: np.ndarray, counted: np.ndarray) -> Statistic:
    """The mean of the counted queries' values (Q,), each at its first row: resamples draw whole queries."""
    sums = np.zeros((len(where), 2))
    first = np.unique(where, return_index=True)[1]
    sums[first] = np.stack([values * counted, counted], 1)
    return Statistic(sums, lambda s: ratio(s[:, 0], s[:, 1]), n=int(counted.sum()))
