"""A watch over the rows that a stage reads while it works: none of test, and of the others no first rows.

Data is sorted by label, as many files are, so the first rows of a split are of one label: whoever judges by them
finds a model that always gives this answer perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from kdcli.context import Applied, Context
from kdcli.data.sources import Rows
from kdcli.inputs import batching
from kdcli.inputs.picked import pick
from kdcli.inputs.splits import Splits
from kdcli.inputs.text import Encoded
from kdcli.stages.distill import control
from kdcli.stages.prune import vocab
from tests.stages import contexts


def sorted_rows(count: int, seed: int) -> Rows:
    """Like :func:`tests.stages.contexts.rows`, all rows of one label before those of the next."""
    rows = contexts.rows(count, seed)
    assert rows.labels is not None
    return rows.take(np.argsort(np.array(rows.labels), kind="stable"))


def splits() -> dict[str, Rows]:
    """More rows than any search or calibration of the tests asks for."""
    return {"train": sorted_rows(48, 1), "validation": sorted_rows(24, 2), "test": sorted_rows(20, 3)}


class TestRowsRead(AssertionError):
    """Rows that only tell how good the result is were read while it was made."""


@dataclass
class Watch:
    """What was read of every split."""

    encoded: dict[str, list[Encoded]] = field(default_factory=dict)
    taken: dict[str, list[np.ndarray]] = field(default_factory=dict)  # by every call, rows that were picked
    batched: dict[str, set[int]] = field(
        default_factory=dict
    )  # rows that were in a batch of the split itself
    closed: bool = False  # to the test rows

    def give(self, split: str, rows: Callable[[], Any]) -> Any:
        """Rows of a split, noted."""
        if split == "test" and self.closed:
            raise TestRowsRead("test rows are read while the stage works")
        found = rows()
        if isinstance(found, Encoded):
            self.encoded.setdefault(split, []).append(found)
        return found

    def split_of(self, rows: Encoded) -> str | None:
        """The split that these rows are, if they are a whole one."""
        for name, known in self.encoded.items():
            if any(one.offsets is rows.offsets for one in known):
                return name
        return None

    def check(self) -> None:
        """Every choice of some rows has rows of all labels, and is not the beginning of the split."""
        for split, picks in self.taken.items():
            for picked in picks:
                self._check(split, picked)
        for split, rows in self.batched.items():
            self._check(split, np.array(sorted(rows)))

    def sampled(self, split: str) -> bool:
        """Whether a part of a split was drawn."""
        size = len(self.encoded[split][0]) if split in self.encoded else 0
        return any(len(np.unique(picked)) < size for picked in self.taken.get(split, []))

    def _check(self, split: str, picked: np.ndarray) -> None:
        whole = self.encoded[split][0]
        unique, labels = np.unique(picked), whole.labels
        if not len(unique) or len(unique) == len(whole) or labels is None:
            return
        if np.array_equal(unique, np.flatnonzero(labels >= 0)):  # all that have a label
            return
        assert not np.array_equal(unique, np.arange(len(unique))), f"the first {len(unique)} rows of {split}"
        classes = np.unique(labels[labels >= 0])
        assert len(unique) < len(classes) or set(classes) <= set(labels[unique].tolist()), (
            f"{len(unique)} rows of {split} have labels {sorted(set(labels[unique].tolist()))} only"
        )


class _Watched(Mapping[str, Any]):
    def __init__(self, inner: Mapping[str, Any], watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    def __getitem__(self, split: str) -> Any:
        return self.watch.give(split, lambda: self.inner[split])

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __contains__(self, split: object) -> bool:
        return split in self.inner


class _Picked:
    """What ``pick`` gives to those that only report on test rows."""

    def __init__(self, opened: Callable[[Any], Any], *given: Any) -> None:
        picked = opened(pick)(*given)
        self.split, self.of = picked.split, opened(picked.of)


@contextmanager
def watching(context: Context) -> Iterator[Watch]:
    """Inside the block the test rows are closed, and what is read of the others is noted and checked at the end.

    Three places may read test rows, because they only report on them: the tokens of a smaller vocabulary, the
    student beside its controls, and the ensemble of the strategy ``layerwise``.
    """
    watch = Watch()

    def opened(work: Callable[..., Any]) -> Callable[..., Any]:
        def measure(*args: Any, **kwargs: Any) -> Any:
            before, watch.closed = watch.closed, False
            try:
                return work(*args, **kwargs)
            finally:
                watch.closed = before

        return measure

    take, collate, own = Encoded.take, batching.collate, Splits.__getitem__

    def noted_take(self: Encoded, indices: Sequence[int] | np.ndarray) -> Encoded:
        if (split := watch.split_of(self)) is not None:
            watch.taken.setdefault(split, []).append(np.arange(len(self))[indices])
        return take(self, indices)

    def noted_collate(encoded: Encoded, indices: Any, *args: Any, **kwargs: Any) -> Any:
        if (split := watch.split_of(encoded)) is not None:
            watch.batched.setdefault(split, set()).update(np.arange(len(encoded))[indices].tolist())
        return collate(encoded, indices, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoded, "take", noted_take)
        patch.setattr(batching, "collate", noted_collate)
        patch.setattr(Splits, "__getitem__", lambda self, split: watch.give(split, lambda: own(self, split)))
        for reporting in (vocab, control):
            patch.setattr(reporting, "pick", lambda *given: _Picked(opened, *given))
        patch.setattr(control, "score", opened(control.score))
        context.encoded = _Watched(context.encoded, watch)
        context.dataset = replace(context.dataset, splits=_Watched(context.dataset.splits, watch))  # type: ignore[arg-type]
        watch.closed = True
        yield watch
        watch.closed = False
        watch.check()


def apply(stage: Any, context: Context) -> tuple[Applied, Watch]:
    """Let a stage work under the watch."""
    with watching(context) as watch:
        applied = contexts.applied(stage, context)
    return applied, watch
