"""New texts from old ones, made on token ids, for a teacher to label."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from kdcli.inputs.text import Encoded


@dataclass(frozen=True)
class Rates:
    """How often each operation happens. Of a token: the highest share of a row's tokens; each row draws
    its own share between 0 and that. Of a row: the share of the rows.
    """

    splice: float = 0.25  # of rows: the beginning of one row and the end of another
    window: float = 0.25  # of rows: only a run of neighbouring tokens is kept
    swap: float = 0.1  # of tokens: it changes places with the next one
    replace: float = 0.4  # of tokens: one of its nearest neighbours stands in its place
    mask: float = 0.2  # of tokens: the mask token stands in its place
    drop: float = 0.2  # of tokens: it is left out


@dataclass(frozen=True)
class Origins:
    """The rows that M made texts come from: one, or the beginning of one and the end of another."""

    first: np.ndarray  # int64 (M,)
    second: np.ndarray  # int64 (M,); the first one again where there is no other
    share: np.ndarray  # float64 (M,): of the ordinary tokens, how many stand where the first row had some

    def take(self, indices: np.ndarray) -> Origins:
        """Those of the texts at these positions."""
        return Origins(self.first[indices], self.second[indices], self.share[indices])


def augment(
    encoded: Encoded,
    n: int,
    *,
    seed: int,
    special: Collection[int],
    mask_id: int | None,
    neighbours: np.ndarray | None,
    rates: Rates | None = None,
) -> tuple[Encoded, Origins]:
    """Make ``n`` changed versions of every row, without labels, deterministic for a seed.

    Special tokens stay where they are, a token keeps the segment id of its place, no row gets longer
    than the longest of ``encoded``, and a row with an ordinary token keeps one.

    Args:
        encoded: N rows.
        n: Versions of each row.
        seed: Of the run.
        special: Ids that are never touched.
        mask_id: The mask token; None masks nothing.
        neighbours: (V, k) token ids that may stand for each token; None replaces nothing.
        rates: Of each operation.

    Returns:
        n * N rows: first one version of every row in the order of ``encoded``, then the second ones.
        Rows that no operation changed are among them. And the rows of ``encoded`` that each was made from.

    Source: word masking and n-gram sampling as in Tang et al. (2019), arXiv:1903.12136;
    replacement by near neighbours in an embedding space as in TinyBERT, Jiao et al. (2020), arXiv:1909.10351;
    deletion and swaps as in Wei and Zou (2019), arXiv:1901.11196.
    Differs: neighbours are tokens and not words, every row draws its own strength, and swaps are of
    neighbouring tokens only.
    """
    rates = rates or Rates()
    rng = np.random.default_rng(seed)
    ordinary = ~np.isin(encoded.ids, np.fromiter(special, dtype=np.int64, count=len(special)))
    tokens, second = _splice(rng, encoded, ordinary, n, rates.splice)
    tokens = tokens.only(_windows(rng, tokens, rates.window))
    ids = tokens.ids
    first = _some(rng, tokens, rates.swap)[:-1] & (tokens.run[1:] == tokens.run[:-1])
    first[1:] &= ~first[:-1]  # a token moves once
    at = np.flatnonzero(first)
    ids[at], ids[at + 1] = ids[at + 1], ids[at]
    other = tokens.other
    other[at], other[at + 1] = other[at + 1], other[at]
    if neighbours is not None:
        at = np.flatnonzero(_some(rng, tokens, rates.replace))
        ids[at] = neighbours[ids[at], rng.integers(neighbours.shape[1], size=len(at))]
    if mask_id is not None:
        ids[_some(rng, tokens, rates.mask)] = mask_id
    tokens = tokens.only(_rescued(rng, tokens, ~_some(rng, tokens, rates.drop)))
    lengths = np.bincount(tokens.row, minlength=n * len(encoded))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    type_ids = None if encoded.type_ids is None else tokens.type_ids
    made = Encoded(tokens.ids, type_ids, offsets, None)
    return made, Origins(np.tile(np.arange(len(encoded)), n), second, _share(tokens, n * len(encoded)))


def unlike(made: Encoded, known: Encoded) -> np.ndarray:
    """Positions of the rows of ``made`` that are neither in ``known`` nor further up in ``made``.

    Rows are compared by 64-bit hashes of their token and segment ids: of a million different rows two
    are taken for the same with a probability of about 3e-8.

    Returns:
        int64, ascending.
    """
    hashes = np.concatenate([_hashes(known), _hashes(made)])
    _, first = np.unique(hashes, return_index=True)
    return np.sort(first[first >= len(known)]) - len(known)


def _hashes(encoded: Encoded) -> np.ndarray:
    """One uint64 a row: the sum of a random number for every (place, token, segment), mixed as in splitmix64."""
    place = np.arange(len(encoded.ids)) - np.repeat(encoded.offsets[:-1], encoded.lengths)
    x = place.astype(np.uint64) << np.uint64(40)
    x |= _segments(encoded).astype(np.uint64) << np.uint64(32)
    x |= encoded.ids.astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(x ^ (x >> np.uint64(31)))])
    return sums[encoded.offsets[1:]] - sums[encoded.offsets[:-1]]


def _segments(encoded: Encoded) -> np.ndarray:
    """Segment ids of all tokens; zeros where the tokenizer gives none."""
    return np.zeros(len(encoded.ids), dtype=np.int8) if encoded.type_ids is None else encoded.type_ids


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all rows in one line, each array (tokens,)."""

    ids: np.ndarray
    type_ids: np.ndarray
    row: np.ndarray
    run: np.ndarray  # which unbroken run of ordinary tokens it is in; -1 for special tokens
    other: np.ndarray  # bool: it comes from the second of two rows

    def only(self, kept: np.ndarray) -> _Tokens:
        return _Tokens(self.ids[kept], self.type_ids[kept], self.row[kept], self.run[kept], self.other[kept])

    @property
    def runs(self) -> int:
        return int(self.run.max(initial=-1)) + 1


def _runs(ordinary: np.ndarray, row: np.ndarray) -> np.ndarray:
    starts = ordinary.copy()
    starts[1:] &= ~(ordinary[:-1] & (row[1:] == row[:-1]))
    return np.where(ordinary, np.cumsum(starts) - 1, -1)


def _splice(
    rng: np.random.Generator, encoded: Encoded, ordinary: np.ndarray, n: int, rate: float
) -> tuple[_Tokens, np.ndarray]:
    """Repeat the rows n times; some keep their first tokens and go on with the last ones of another row.

    Returns:
        The tokens, and the other row (n * N,); the row itself where there is none.
    """
    count, lengths = len(encoded), encoded.lengths
    longest = int(lengths.max(initial=0))
    row = np.repeat(np.arange(count), lengths)
    texts = np.bincount(row[ordinary], minlength=count)
    run = _runs(ordinary, row)
    whole = np.bincount(row[np.flatnonzero(np.diff(run, prepend=-1) > 0)], minlength=count) == 1
    head = np.bincount(row[np.cumsum(ordinary) - np.repeat(_before(texts), lengths) == 0], minlength=count)
    tail = lengths - head - texts
    # Only rows whose text is one unbroken run are cut, and no pair of which one text is empty.
    whole &= (head == head[whole].min(initial=longest)) & (tail == tail[whole].min(initial=longest))
    first = np.tile(np.arange(count), n)
    second = rng.integers(count, size=len(first)) if count else first
    spliced = (rng.random(len(first)) < rate) & whole[first] & whole[second]
    cut = head[first] + np.ceil(rng.random(len(first)) * texts[first]).astype(np.int64)
    one = np.where(spliced, np.maximum(cut, 1), lengths[first])
    more = np.ceil(rng.random(len(first)) * texts[second]).astype(np.int64)
    two = np.where(spliced, tail[second] + np.minimum(more, longest - one - tail[second]), 0)
    starts = np.stack(
        [encoded.offsets[first], encoded.offsets[second] + lengths[second] - two], axis=1
    ).ravel()
    sizes = np.stack([one, two], axis=1).ravel()
    at = np.repeat(starts - _before(sizes), sizes) + np.arange(int(sizes.sum()))
    made = np.repeat(np.arange(len(first)), one + two)
    other = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
    tokens = _Tokens(encoded.ids[at], _segments(encoded)[at], made, _runs(ordinary[at], made), other)
    return tokens, np.where(spliced, second, first)


def _share(tokens: _Tokens, rows: int) -> np.ndarray:
    """Of each row's ordinary tokens, the share that is not from another row; 1 where there are none."""
    inside = tokens.run >= 0
    total = np.bincount(tokens.row[inside], minlength=rows)
    other = np.bincount(tokens.row[inside & tokens.other], minlength=rows)
    return 1 - other / np.maximum(total, 1)


def _windows(rng: np.random.Generator, tokens: _Tokens, rate: float) -> np.ndarray:
    """Which tokens stay when some runs are cut to a window of at least a third of their tokens."""
    inside = tokens.run >= 0
    sizes = np.bincount(tokens.run[inside], minlength=tokens.runs)
    cut = rng.random(tokens.runs) < rate
    width = np.where(cut, np.ceil(sizes * (1 + 2 * rng.random(tokens.runs)) / 3).astype(np.int64), sizes)
    start = np.floor(rng.random(tokens.runs) * (sizes - width + 1)).astype(np.int64)
    run = tokens.run[inside]
    place = np.arange(len(run)) - _before(sizes)[run]
    kept = np.ones(len(inside), dtype=bool)
    kept[inside] = (place >= start[run]) & (place < (start + width)[run])
    return kept


def _some(rng: np.random.Generator, tokens: _Tokens, rate: float) -> np.ndarray:
    """Choose ordinary tokens; each row draws its own share between 0 and ``rate``."""
    share = rng.random(int(tokens.row.max(initial=-1)) + 1) * rate
    return (rng.random(len(tokens.ids)) < share[tokens.row]) & (tokens.run >= 0)


def _rescued(rng: np.random.Generator, tokens: _Tokens, kept: np.ndarray) -> np.ndarray:
    """Keep one token, drawn at random, of every run that would lose all of them."""
    at = np.flatnonzero(tokens.run >= 0)
    run = tokens.run[at]
    sizes = np.bincount(run, minlength=tokens.runs)
    lost = np.flatnonzero(np.bincount(run[kept[at]], minlength=tokens.runs) == 0)
    place = _before(sizes)[lost] + rng.integers(np.maximum(sizes[lost], 1))
    kept[at[place]] = True
    return kept


def _before(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes
