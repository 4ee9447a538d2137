"""Rows of text into token ids, kept as flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.data.readers import Rows
from kdcli.errors import InputError
from kdcli.input_names import IDS, MASK, SEGMENTS
from kdcli.inputs import targets
from kdcli.names import printable
from kdcli.tasks.task import Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
    place: Callable[[int], str] | None = None,
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
        place: Where a row is, for a message; None: by its number in ``title``.

    Raises:
        InputError: ``max_length`` has no room for text, a row has no tokens at all, or a label is not in
            ``label_index``.
    """
    special = tokenizer.num_special_tokens_to_add(pair=rows.second is not None)
    if max_length <= special:
        raise InputError(f"{max_length} tokens have no room for text: the special tokens alone are {special}")
    ids, types, counts, cut = [], [], [], 0
    segments = SEGMENTS in tokenizer.model_input_names
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
            lengths = np.fromiter(map(len, made[IDS]), np.int64)
            total = int(lengths.sum())
            ids.append(np.fromiter(chain.from_iterable(made[IDS]), np.int32, total))
            if segments:
                types.append(np.fromiter(chain.from_iterable(made[SEGMENTS]), np.int8, total))
            counts.append(lengths)
            if len(blank := np.flatnonzero(lengths == 0)):
                at = start + int(blank[0])
                raise InputError(
                    f"{f'row {at + 1} of {title}' if place is None else place(at)} has no tokens: its text is "
                    f"'{printable(rows.first[at])[:40]}', and the tokenizer adds no special tokens",
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


@dataclass(frozen=True)
class Text:
    """Texts and pairs of texts as token ids: what :class:`kdcli.inputs.kinds.Inputs` asks for.

    Every input is (B, T), B rows of T tokens.
    """

    name: str = "text"
    names: tuple[str, ...] = (IDS, MASK, SEGMENTS)
    main: str = IDS
    optional: frozenset[str] = frozenset({SEGMENTS})
    masking: str = MASK
    axes: Mapping[int, str] = field(default_factory=lambda: {0: "batch", 1: "sequence"})

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        longest: int,
        label_index: Mapping[str, int] | None,
        title: str,
        *,
        kind: Kind,
        outputs: int,
        place: Callable[[int], str] | None = None,
    ) -> Encoded:
        """As :func:`encode`."""
        return encode(rows, tokenizer, longest, label_index, title, kind=kind, outputs=outputs, place=place)

    def mask(self, batch: Mapping[str, Any]) -> Any:
        """(B, T), 1 for a real token."""
        return batch[MASK]

    def shape(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """B and T."""
        rows, tokens = batch[IDS].shape
        return int(rows), int(tokens)

    def filled(self, batch: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
        """Segment ids that a tokenizer does not give are zeros, as a model takes them to be."""
        none = {} if SEGMENTS in batch else {SEGMENTS: np.zeros_like(batch[IDS])}
        known = {**batch, **none}
        return {name: known[name] for name in names if name in known}

    def example(
        self, vocabulary: int, names: Iterable[str], device: torch.device | str, *, tokens: int = 7
    ) -> dict[str, Tensor]:
        """A batch for tracing, (2, 7) or ``tokens`` where fewer are allowed, with padding in its second row."""
        import torch  # whoever only encodes does without

        width = max(2, min(7, tokens))
        ids = np.arange(2 * width, dtype=np.int64).reshape(2, width) % max(vocabulary, 1)
        made = {IDS: ids, MASK: np.ones_like(ids), SEGMENTS: np.zeros_like(ids)}
        made[MASK][1, -2:] = 0 if width > 2 else 1
        return {name: torch.from_numpy(made[name]).to(device) for name in names}

    def repeated(self, token: int, tokens: int) -> dict[str, np.ndarray]:
        """One row of one token over and over, (1, T)."""
        row = np.full((1, tokens), token, dtype=np.int64)
        return {IDS: row, MASK: np.ones_like(row), SEGMENTS: np.zeros_like(row)}

    def row(self, config: Any, tokens: int, device: torch.device | str) -> dict[str, Tensor]:
        """One row (1, T) of a token that is not special, without segment ids."""
        import torch

        first = int(config.pad_token_id or 0) + 3
        ids = torch.full((1, tokens), first % int(getattr(config, "vocab_size", first + 1)), device=device)
        if isinstance(end := getattr(config, "eos_token_id", None), int):
            ids[:, -1] = end  # BART and its kin classify from the end of the text, and fail without one
        return {IDS: ids, MASK: torch.ones_like(ids)}


TEXT = Text()


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
