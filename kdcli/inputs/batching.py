"""Which rows go together, and padding them into one rectangle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdcli.input_names import IDS, MASK, SEGMENTS
from kdcli.inputs.text import Encoded

Arrays = Mapping[str, np.ndarray]
"""The model inputs of one batch: name -> (B, T)."""


def collate(
    encoded: Encoded,
    indices: Sequence[int] | np.ndarray,
    pad_id: int,
    type_pad: int = 0,
    width: int | None = None,
) -> dict[str, np.ndarray]:
    """Pad B rows on the right, or on the left where ``pad_id`` has a true attribute ``left``.

    Args:
        encoded: The rows.
        indices: Which of them, (B,), in this order.
        pad_id: Token id of the padding.
        type_pad: Segment id of the padding.
        width: Tokens of the result; the longest row when None.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the tokenizer gives them, ``token_type_ids``, each int64 (B, T).

    Raises:
        ValueError: A row is longer than ``width``.
    """
    rows = np.arange(len(encoded))[indices]
    lengths = encoded.lengths[rows]
    longest = int(lengths.max(initial=0))
    if width is not None and width < longest:
        raise ValueError(f"a row of {longest} tokens does not fit into width {width}")
    wide = longest if width is None else width
    place = np.arange(wide)
    mask = place >= wide - lengths[:, None] if getattr(pad_id, "left", False) else place < lengths[:, None]
    at = encoded.positions(rows)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = encoded.ids[at]
    made = {IDS: ids, MASK: mask.astype(np.int64)}
    if encoded.type_ids is not None:
        made[SEGMENTS] = np.full(mask.shape, type_pad, dtype=np.int64)
        made[SEGMENTS][mask] = encoded.type_ids[at]
    return made


def train_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int | None = None
) -> list[np.ndarray]:
    """Random batches of rows of like length, so that little is padding.

    The rows are shuffled, cut into windows of ``window`` batches, sorted by length inside a window,
    cut into batches, and the batches shuffled. Every row comes exactly once.

    Args:
        lengths: Tokens of each row, (N,).
        batch_size: Rows of a batch; one batch has fewer when N is not a multiple.
        seed: Of the run.
        epoch: Every epoch has its own order; the same ``(seed, epoch)`` always the same.
        window: Batches among which rows are sorted; 1 sorts inside a batch only. By default 50, but never more
            than a sixth of an epoch: batches that differ in length differ in what they say, too. Measured with a
            student of 2x128 on 3,000 rows in 94 batches an epoch: 64% with all of them in two windows, 69% with
            windows of 5 and 70% with batches drawn at random.
    """
    if window is None:
        window = max(1, min(50, len(lengths) // (6 * batch_size)))
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    blocks = np.arange(len(lengths)) // (window * batch_size)
    order = shuffled[np.lexsort((np.asarray(lengths)[shuffled], blocks))]
    batches = _cut(order, np.arange(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def inference_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of rows sorted by length, the longest first: the largest need of memory comes at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return _cut(order, np.arange(batch_size, len(order), batch_size))


def equal_length_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches whose rows are all of one length, the longest first: no padding at all."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    _, first, group = np.unique(-np.asarray(lengths)[order], return_index=True, return_inverse=True)
    place = np.arange(len(order)) - first[group]
    return _cut(order, np.flatnonzero(place % batch_size == 0)[1:])


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """The share of all cells of these batches that is padding, in [0, 1)."""
    cells = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1.0 - sum(int(lengths[rows].sum()) for rows in batches) / cells if cells else 0.0


def _cut(order: np.ndarray, borders: np.ndarray) -> list[np.ndarray]:
    return np.split(order, borders) if len(order) else []
