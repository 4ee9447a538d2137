"""What every file form is read into: columns by name, and rows that remember where they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from kdcli.errors import InputError
from kdcli.tasks.task import Kind

_T = TypeVar("_T")

Label = str | tuple[str, ...] | float
"""One row's answer by its kind: a name, the sorted names of any number of labels, or a number."""


@dataclass(frozen=True)
class Rows:
    """Texts, or pairs of texts, with their labels where they have any."""

    first: list[str]
    second: list[str] | None = None
    labels: Sequence[Label] | None = None
    #: Rows of one query are ranked against each other.
    queries: list[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these positions, in this order."""
        picked = np.arange(len(self))[indices].tolist()

        def pick(values: Sequence[_T] | None) -> list[_T] | None:
            return None if values is None else [values[i] for i in picked]

        return Rows([self.first[i] for i in picked], pick(self.second), pick(self.labels), pick(self.queries))


@dataclass(frozen=True)
class Located:
    """Rows that remember where they came from, for messages; ``rows.labels`` is None where none has one."""

    rows: Rows
    source: str
    lines: Sequence[int]
    unit: str = "line"
    #: Rows left out because they have no label.
    without_label: int = 0
    kind: Kind = "one-of"

    def place(self, i: int) -> str:
        """Where row ``i`` is, for a message."""
        return f"{self.source}, {self.unit} {self.lines[i]}"

    def take(self, indices: np.ndarray) -> Located:
        """The rows at these positions, in this order."""
        lines = [self.lines[i] for i in indices.tolist()]
        return replace(self, rows=self.rows.take(indices), lines=lines)


@dataclass(frozen=True)
class Table:
    """A file's columns by name; ``column`` gives the values of one, one per entry of ``lines``."""

    source: str
    names: list[str]
    lines: Sequence[int]
    column: Callable[[str], list[Any]]
    unit: str = "line"
    #: Column of class numbers -> the names of its classes, where the file knows them.
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def place(self, i: int) -> str:
        """Where row ``i`` is, for a message."""
        return f"{self.source}, {self.unit} {self.lines[i]}"


def joined(source: str, tables: Sequence[Table]) -> Table:
    """The rows of several files of one kind, one file after the other, counted through.

    Raises:
        InputError: They do not have the same columns, or other names for the same class.
    """
    first = tables[0]
    for other in tables[1:]:
        if set(other.names) != set(first.names) or dict(other.classes) != dict(first.classes):
            raise InputError(f"'{other.source}' has other columns or classes than '{first.source}'")

    def column(name: str) -> list[Any]:
        return [value for table in tables for value in table.column(name)]

    rows = range(1, sum(len(table.lines) for table in tables) + 1)
    return Table(source, first.names, rows, column, "row", first.classes)
