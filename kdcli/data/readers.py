"""One data file into rows: texts and label names, every value checked, every complaint with its line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcli.data.answers import read_labels
from kdcli.data.columns import Columns, complete, named, parse_columns, text_roles
from kdcli.data.delimited import MAX_CHARACTERS
from kdcli.data.files import read_table
from kdcli.data.tables import Located, Rows, Table
from kdcli.errors import InputError
from kdcli.names import printable

__all__ = ["Columns", "Located", "Rows", "Table", "extract", "parse_columns", "read", "table_of"]

_SURROGATE = re.compile("[\ud800-\udfff]")


def read(path: Path, columns: Columns, *, labelled: bool = True) -> Located:
    """Read the texts, and the labels, of one file.

    Args:
        path: A file of a form that :mod:`kdcli.data.files` reads.
        columns: The columns that are not named like their role.
        labelled: Whether the label column is read.

    Raises:
        InputError: The file is not there, broken, empty, or lacks a column or a value.
    """
    return extract(table_of(path, columns, labelled=labelled), columns, labelled=labelled)


def table_of(path: Path, columns: Columns, *, labelled: bool = True) -> Table:
    """Open one file; where its form leaves a choice, as separators do, the columns needed decide."""

    def fits(names: Sequence[str]) -> bool:
        return complete(names, columns, labelled=labelled)

    return read_table(path, fits)


def extract(table: Table, columns: Columns, *, labelled: bool = True) -> Located:
    """Pick the text and label columns of a table and check every value.

    Rows without a label are left out and counted; where none has a label, all stay and ``labels`` is None.
    """
    first, *second = (_texts(table, named(table, role, columns)) for role in text_roles(table.names, columns))
    rows = Rows(first, second[0] if second else None, None)
    if not labelled:
        return Located(rows, table.source, table.lines, table.unit)
    name = named(table, "label", columns)
    labels = read_labels(table, name, ids=columns.ids)
    if all(label is None for label in labels):
        return Located(rows, table.source, table.lines, table.unit, without_label=len(rows))
    names = [label or "" for label in labels]
    for label in dict.fromkeys(names):
        _check(label, table, names.index(label), name)
    part = Located(Rows(rows.first, rows.second, names), table.source, table.lines, table.unit)
    kept = np.flatnonzero([label is not None for label in labels])
    if len(kept) == len(labels):
        return part
    return replace(part.take(kept), without_label=len(labels) - len(kept))


def _texts(table: Table, name: str) -> list[str]:
    values = table.column(name)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            found = "is missing" if value is None else f"is {type(value).__name__}, not text"
            if value is None and (more := values.count(None) - 1):
                found += f", as in {more} further rows"
            raise InputError(f"{table.place(i)}: the text in column '{printable(name)}' {found}")
        _check(value, table, i, name)
    return values


def _check(value: str, table: Table, i: int, name: str) -> None:
    if len(value) > MAX_CHARACTERS:
        raise InputError(
            f"{table.place(i)}: column '{printable(name)}' has {len(value)} characters; "
            f"at most {MAX_CHARACTERS} are read"
        )
    if not value.isascii() and _SURROGATE.search(value):
        raise InputError(f"{table.place(i)}: column '{printable(name)}' holds half of a surrogate pair")
