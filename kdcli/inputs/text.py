"""Rows of text into token ids, kept as flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from kdcli.data.readers import Rows
from kdcli.errors import InputError
from kdcli.inputs import targets
from kdcli.names import printable
from kdcli.tasks.task import Kind

_CHUNK = 4096  # rows per tokenizer call, so that its lists of Python integers stay small


@dataclass(frozen=True)
class Encoded:
    """N tokenised rows; row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32 (tokens,)
    type_ids: np.ndarray | None  # int8 (tokens,); None: the tokenizer gives no segment ids
    offsets: np.ndarray  # int64 (N + 1,)
    labels: np.ndarray | None  # (N,) or (N, C), in the form of the task
    cut: int = 0  # rows that were longer; known of whole splits alone
    queries: np.ndarray | None = None  # int64 (N,): rows of one number are ranked against each other

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, special tokens included, int64 (N,)."""
        return np.diff(self.offsets)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where the tokens of these rows are in ``ids``, one row after the other, int64 (tokens,)."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        return np.arange(int(lengths.sum())) + np.repeat(self.offsets[rows] - (ends - lengths), lengths)

    def take(self, indices: Sequence[int] | np.ndarray) -> Encoded:
        """The rows at these positions, in this order; repeats are allowed."""
        rows = np.arange(len(self))[indices]
        at = self.positions(rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        return Encoded(
            self.ids[at],
            None if self.type_ids is None else self.type_ids[at],
            offsets,
            None if self.labels is None else self.labels[rows],
            queries=None if self.queries is None else self.queries[rows],
        )


def encode(
    rows: Rows,
    tokenizer: Any,
    max_length: int,
    label_index: Mapping[str, int] | None,
    title: str = "the data",
    *,
    kind: Kind = "one-of",
    outputs: int = 0,
) -> Encoded:
    """Tokenise rows with special tokens, cut to ``max_length`` tokens, never padded.

    Args:
        rows: N texts or pairs of texts; a pair is cut token by token from the longer text.
        tokenizer: A fast tokenizer of transformers. Its own truncation and padding settings are
            ignored, and as they were afterwards. Segment ids are those that it gives, or none.
        max_length: Tokens, special tokens included.
        label_index: Label name -> index; None leaves the labels out. Numbers have no names: any mapping.
        title: What the rows are called in a message.
        kind: What a label is.
        outputs: C, where any of C labels can apply.

    Raises:
        InputError: ``max_length`` has no room for text, a row has no tokens at all, or a label is not in
            ``label_index``.
    """
    special = tokenizer.num_special_tokens_to_add(pair=rows.second is not None)
    if max_length <= special:
        raise InputError(f"{max_length} tokens have no room for text: the special tokens alone are {special}")
    ids, types, counts, cut = [], [], [], 0
    segments = "token_type_ids" in tokenizer.model_input_names
    with _settings_kept(tokenizer):
        for start in range(0, len(rows), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            made = tokenizer(
                rows.first[chunk],
                None if rows.second is None else rows.second[chunk],
                truncation="longest_first",
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
            )
            lengths = np.fromiter(map(len, made["input_ids"]), np.int64)
            total = int(lengths.sum())
            ids.append(np.fromiter(chain.from_iterable(made["input_ids"]), np.int32, total))
            if segments:
                types.append(np.fromiter(chain.from_iterable(made["token_type_ids"]), np.int8, total))
            counts.append(lengths)
            if len(blank := np.flatnonzero(lengths == 0)):
                raise InputError(
                    f"row {start + int(blank[0]) + 1} of {title} has no tokens: its text is "
                    f"'{printable(rows.first[start + int(blank[0])])[:40]}', and the tokenizer adds no special tokens",
                    "leave such rows out, or give their texts a word",
                )
            cut += sum(bool(made.encodings[i].overflowing) for i in np.flatnonzero(lengths == max_length))
    empty = np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([empty, *counts]))]).astype(np.int64)
    labels = None
    if rows.labels is not None and label_index is not None:
        labels = targets.as_array(rows.labels, kind, label_index, outputs)
    return Encoded(
        np.concatenate([empty.astype(np.int32), *ids]),
        np.concatenate([empty.astype(np.int8), *types]) if segments else None,
        offsets,
        labels,
        cut,
        None if rows.queries is None else targets.groups(rows.queries),
    )


def concatenate(first: Encoded, second: Encoded, fill: np.ndarray) -> Encoded:
    """The rows of both; a side without labels gets ``fill``, the labels of one row, unless neither side has any.

    The rows of a side without queries are queries of their own.
    """
    labels = queries = None
    if first.labels is not None or second.labels is not None:
        both = (first, second)
        labels = np.concatenate(
            [np.repeat(fill, len(x), axis=0) if x.labels is None else x.labels for x in both]
        )
    if first.queries is not None or second.queries is not None:
        each = [np.arange(len(x)) if x.queries is None else x.queries for x in (first, second)]
        queries = np.concatenate([each[0], each[1] + each[0].max(initial=-1) + 1])
    types = None
    if first.type_ids is not None and second.type_ids is not None:
        types = np.concatenate([first.type_ids, second.type_ids])
    return Encoded(
        np.concatenate([first.ids, second.ids]),
        types,
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        labels,
        queries=queries,
    )


def fingerprint(encoded: Encoded) -> str:
    """sha256 over the tokens, the segment ids, the row borders, the labels, and the queries where there are any."""
    digest = hashlib.sha256()
    queries = [] if encoded.queries is None else [encoded.queries]
    for array in (encoded.ids, encoded.type_ids, encoded.offsets, encoded.labels, *queries):
        digest.update(b"none" if array is None else f"{array.dtype.str}{array.shape}".encode())
        digest.update(b"" if array is None else np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _settings_kept(tokenizer: Any) -> Iterator[None]:
    """Calling a fast tokenizer changes the truncation and padding it would be saved with."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)
