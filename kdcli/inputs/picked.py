"""The rows that quality is measured on, and how another run can tell that it has the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kdcli.data.sources import Dataset
from kdcli.data.splits import strata
from kdcli.errors import UsageError
from kdcli.inputs import sampling
from kdcli.inputs.targets import groups
from kdcli.inputs.text import Encoded, Rows


@dataclass(frozen=True)
class Picked:
    """Some rows of one split, chosen once for all models of a run."""

    split: str
    at: np.ndarray  # positions in the split, ascending
    total: int  # rows of the split
    sha256: str  # of texts and labels, whatever the order of the rows
    split_sha256: str  # the same of all rows of the split

    def of(self, encoded: Mapping[str, Encoded]) -> Encoded:
        """These rows as one model reads them."""
        rows = encoded[self.split]
        return rows if len(self.at) == self.total else rows.take(self.at)


def pick(dataset: Dataset, split: str | None, limit: int | None) -> Picked:
    """The rows that quality is measured on: of ``test`` where there is one, else of ``validation``.

    They are drawn from the data and not from what a model makes of it, so that models with other tokens and
    other orders of their labels meet the same ones.

    Raises:
        UsageError: There is no such split.
    """
    splits = dataset.splits
    name = split or next((one for one in ("test", "validation") if one in splits), "train")
    if name not in splits:
        raise UsageError(f"the data has no split '{name}'; it has {', '.join(sorted(splits))}")
    total = len(splits[name])
    at = _positions(splits[name], total if limit is None else limit)
    every = _each(splits[name])
    return Picked(name, at, total, _joined([every[i] for i in at]), _joined(every))


def _positions(rows: Rows, count: int) -> np.ndarray:
    """At most ``count`` rows in the shares of their labels; whole queries, without which a ranking is another one."""
    if rows.queries is not None:
        return sampling.whole_groups(groups(rows.queries), count, sampling.JUDGING_SEED)
    codes = None if rows.labels is None else np.unique(strata(rows.labels), return_inverse=True)[1]
    return sampling.positions(codes, len(rows), count, sampling.JUDGING_SEED)


def _each(rows: Rows) -> list[bytes]:
    columns = [
        column for column in (rows.first, rows.second, rows.labels, rows.queries) if column is not None
    ]
    return [hashlib.sha256(json.dumps(row).encode()).digest() for row in zip(*columns, strict=True)]


def _joined(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
