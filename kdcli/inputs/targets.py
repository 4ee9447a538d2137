"""Labels of rows as the arrays that a task reads; :mod:`kdcli.tasks.task` has their forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from kdcli.data.labels import suggest
from kdcli.errors import InputError
from kdcli.names import printable
from kdcli.tasks.task import Kind


def as_array(labels: Sequence[Any], kind: Kind, index: Mapping[str, int], outputs: int) -> np.ndarray:
    """The labels of N rows as an array.

    Args:
        labels: A name a row, a tuple of names a row, or a number a row, as ``kind`` says.
        kind: What one answer is.
        index: Label name -> its place among the outputs; not read where the answer is a number.
        outputs: C, read where any of C labels can apply.

    Returns:
        (N,) int64, (N, C) float32 of 0 and 1, or (N,) float32.

    Raises:
        InputError: A name is not in ``index``.
    """
    if kind == "number":
        return np.array(labels, dtype=np.float32)
    if kind == "one-of":
        return _places(labels, index)
    found = np.zeros((len(labels), outputs), dtype=np.float32)
    rows = np.repeat(np.arange(len(labels)), [len(names) for names in labels])
    found[rows, _places(list(chain.from_iterable(labels)), index)] = 1.0
    return found


def groups(queries: Sequence[str]) -> np.ndarray:
    """The query of each of N rows as a number from 0 on, int64 (N,)."""
    return np.unique(np.array(queries, dtype=object), return_inverse=True)[1].astype(np.int64)


def _places(labels: Sequence[str], index: Mapping[str, int]) -> np.ndarray:
    names, codes = np.unique(np.array(labels, dtype=object), return_inverse=True)
    for name in names:
        if name not in index:
            raise InputError(f"unknown label '{printable(name)}': {suggest(name, index)}")
    return np.array([index[name] for name in names], dtype=np.int64)[codes]
