"""One data file into rows: texts and labels, every value checked, every complaint with its line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcli.data.answers import are_numbers, are_scores, read_labels
from kdcli.data.columns import (
    Columns,
    complete,
    is_flags,
    named,
    parse_columns,
    query_of,
    ranks,
    settled,
    targets,
    text_roles,
)
from kdcli.data.delimited import MAX_CHARACTERS
from kdcli.data.files import read_table
from kdcli.data.label_sets import read_flags, read_sets
from kdcli.data.numbers import read_numbers
from kdcli.data.tables import Label, Located, Rows, Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError
from kdcli.names import printable
from kdcli.tasks.task import Kind

__all__ = [
    "Columns",
    "Located",
    "Rows",
    "Table",
    "Wanted",
    "extract",
    "parse_columns",
    "read",
    "recognised",
    "table_of",
]

_SURROGATE = re.compile("[\ud800-\udfff]")


def read(path: Path, columns: Columns, wanted: Wanted | None = None, *, labelled: bool = True) -> Located:
    """Read the texts, and the labels, of one file.

    Args:
        path: A file of a form that :mod:`kdcli.data.files` reads.
        columns: The columns that are not named like their role.
        wanted: The kind of its labels; None finds it from the file.
        labelled: Whether the label column is read.

    Raises:
        InputError: The file is not there, broken, empty, or lacks a column or a value.
    """
    return extract(table_of(path, columns, labelled=labelled), columns, wanted, labelled=labelled)


def table_of(path: Path, columns: Columns, *, labelled: bool = True) -> Table:
    """Open one file; where its form leaves a choice, as separators do, the columns needed decide."""

    def fits(names: Sequence[str]) -> bool:
        return complete(names, columns, labelled=labelled)

    return read_table(path, fits)


def recognised(table: Table, columns: Columns) -> Kind | None:
    """What one answer of this file is, where nobody says so; None where no row has one.

    Lists are sets of labels, and so is whatever ``--columns labels=`` names. Numbers of which one has a fraction are
    numbers, and so are whole ones beside a query that ranks them, and whatever a declared query ranks. Anything else is
    one label of several.

    Raises:
        InputError: ``--columns labels=`` names columns that are not there.
    """
    if "labels" in columns.names:
        return "any-of"
    if "query" in columns.names:
        return "number"
    # A column 'labels' counts where it holds lists, a column 'score' where it holds scores.
    for name in dict.fromkeys(name for kind in _KINDS for name in targets(table.names, columns, kind)):
        values = table.column(name)
        if any(isinstance(value, list) for value in values):
            return "any-of"
        numbered = table.classes.get(name) is None and not columns.ids
        if numbered and (are_scores(values) or (are_numbers(values) and ranks(table, columns))):
            return "number"
        if any(value is not None and value != "" for value in values):
            return "one-of"
    return None


_KINDS: tuple[Kind, ...] = ("one-of", "any-of", "number")


def extract(
    table: Table, columns: Columns, wanted: Wanted | None = None, *, labelled: bool = True
) -> Located:
    """Pick the text and label columns of a table and check every value.

    Rows without a label are left out and counted; where none has a label, all stay and ``labels`` is None.

    Args:
        table: The file.
        columns: The columns that are not named like their role.
        wanted: The kind of its labels; None finds it from the file.
        labelled: Whether the labels are read.

    Raises:
        InputError: The file lacks a column or a value, or its labels are not of the kind that is wanted.
    """
    if wanted is None:
        wanted = Wanted((recognised(table, columns) if labelled else None) or "one-of")
    kind = wanted.kind
    columns = settled(table, columns, kind)
    first, *second = (_texts(table, named(table, role, columns)) for role in text_roles(table.names, columns))
    rows = Rows(first, second[0] if second else None, None, _queries(table, columns, wanted))
    if not labelled:
        return Located(rows, table.source, table.lines, table.unit, kind=kind)
    name, labels = _labels(table, columns, wanted)
    for label, i in _first_of_each(labels).items():
        _check(label, table, i, name)
    missing = sum(label is None for label in labels)
    if missing == len(labels):
        return Located(rows, table.source, table.lines, table.unit, missing, kind)
    labelled_rows = replace(rows, labels=["" if label is None else label for label in labels])
    part = Located(labelled_rows, table.source, table.lines, table.unit, kind=kind)
    if not missing:
        return part
    kept = np.flatnonzero([label is not None for label in labels])
    return replace(part.take(kept), without_label=missing)


def _labels(table: Table, columns: Columns, wanted: Wanted) -> tuple[str, Sequence[Label | None]]:
    """The labels of all rows, and the name of their column, or of what names several."""
    declared = columns.names.get("labels")
    if declared is not None and wanted.kind != "any-of":
        raise wanted.contradicted(
            f"--columns labels={printable(declared)} says that a row has any number of labels",
            "name the column of the answers: --columns label=NAME",
        )
    found = targets(table.names, columns, wanted.kind)
    if wanted.kind == "any-of" and is_flags(table.names, columns):
        return declared or "", read_flags(table, found)
    if not found and declared is None and "label" not in columns.names:
        for other in targets(table.names, columns, "any-of"):
            if any(isinstance(value, list) for value in table.column(other)):
                raise wanted.contradicted(
                    f"'{table.source}' has no column 'label', and lists of labels in column '{printable(other)}'",
                    f"to learn several labels at once: {wanted.other('any-of')}",
                )
    name = found[0] if found else named(table, "label" if declared is None else "labels", columns)
    if table.names.count(name) > 1:
        raise InputError(f"'{table.source}' has {table.names.count(name)} columns named '{printable(name)}'")
    if wanted.kind == "any-of":
        return name, read_sets(table, name, columns, wanted)
    if wanted.kind == "number":
        if columns.ids:
            raise wanted.contradicted(
                f"--columns label={printable(name)}:ids says that the labels are classes"
            )
        return name, read_numbers(table, name, wanted)
    return name, read_labels(table, name, ids=columns.ids, wanted=wanted)


def _first_of_each(labels: Sequence[Label | None]) -> dict[str, int]:
    """Where each name stands first."""
    found: dict[str, int] = {}
    for i, label in enumerate(labels):
        for name in label if isinstance(label, tuple) else (label,):
            if isinstance(name, str):
                found.setdefault(name, i)
    return found


def _queries(table: Table, columns: Columns, wanted: Wanted) -> list[str] | None:
    """Which rows are ranked against each other; None where the file does not say."""
    if wanted.kind != "number":
        if "query" in columns.names:
            raise wanted.contradicted(
                f"--columns query={printable(columns.names['query'])} asks for rows to be ranked",
                f"rows are ranked by numbers: {wanted.other('number')}",
            )
        return None
    name = query_of(table.names, columns)
    if name is None:
        if "query" in columns.names:
            named(table, "query", columns)  # raises
        return None
    found = []
    for i, value in enumerate(table.column(name)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (isinstance(value, str) and value.strip())):
            what = (
                "is missing"
                if value in (None, "") or isinstance(value, str)
                else "is neither text nor a whole number"
            )
            raise InputError(f"{table.place(i)}: the query in column '{printable(name)}' {what}")
        found.append(str(value).strip())
    return found


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
