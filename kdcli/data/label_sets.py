"""Columns with any number of labels a row: lists, cells with a separator, or one column of 0 and 1 a label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kdcli.data.answers import MAX_IDS, several_labels, undeclared
from kdcli.data.columns import Columns
from kdcli.data.labels import number_of
from kdcli.data.tables import Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError
from kdcli.names import printable

Names = tuple[str, ...]
"""The labels of a row: distinct, sorted."""

_NEGATIVE = re.compile(r"-[0-9]+")

_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "-1": -1, "-1.0": -1}


def read_sets(table: Table, name: str, columns: Columns, wanted: Wanted) -> list[Names | None]:
    """The label names of each row of one column; None for a row without a label.

    An empty list, and an empty cell, say that no label applies. A missing value says that nobody has labelled the
    row; and so do all cells where every one is empty.

    Args:
        table: The file.
        name: Its column.
        columns: Whether the labels are ids, and what separates those of a cell.
        wanted: Who says that a row has several labels, for messages.

    Raises:
        InputError: A value is no list of names, or one label a row where nothing says that this is meant.
    """
    values = table.column(name)
    where = f"'{table.source}': the label column '{printable(name)}'"
    lists = [isinstance(value, list) for value in values]
    if any(lists):
        if columns.separator is not None:
            raise InputError(
                f"{where} holds lists, which need no separator", f"--columns labels={printable(name)}"
            )
        found = _of_lists(table, name, values, None if columns.ids else table.classes.get(name))
        if columns.ids:
            found = [_ids(table, name, i, names) for i, names in enumerate(found)]
        else:
            _refuse_negative(table, name, found)
        return found
    declared = "labels" in columns.names or name.casefold() == "labels"
    if not declared and any(value is not None for value in values):
        raise wanted.contradicted(
            f"{where} has one label a row",
            f"where a row can have any number of labels and these have one: --columns labels={printable(name)}",
        )
    return _of_cells(table, name, values, columns, where)


def read_flags(table: Table, names: Sequence[str]) -> list[Names | None]:
    """The names of the columns in which a row has 1; None for a row with nothing, or -1, in all of them.

    Raises:
        InputError: A value is neither 0 nor 1, or some of a row's are missing.
    """
    values = [table.column(name) for name in names]
    found: list[Names | None] = []
    known: dict[tuple[Any, ...], Names | None] = {}
    for i, row in enumerate(zip(*values, strict=True)):
        key = tuple((type(value), value) for value in row if not isinstance(value, list | dict))
        if len(key) < len(row) or key not in known:
            known[key] = _flags_of(table, i, names, row)
        found.append(known[key])
    return found


def _flags_of(table: Table, i: int, names: Sequence[str], row: Sequence[Any]) -> Names | None:
    flags = []
    for name, value in zip(names, row, strict=True):
        said = "" if value is None or value != value else str(value).strip().casefold()
        flag = None if said == "" else _FLAGS.get(said)
        if flag is None and said:
            raise InputError(
                f"{table.place(i)}: column '{printable(name)}' has {printable(repr(value))}; a column of one label "
                "holds 0 and 1 alone"
            )
        flags.append(flag)
    without = [flag is None or flag < 0 for flag in flags]
    if all(without):
        return None
    if any(without):
        raise InputError(
            f"{table.place(i)}: the label in column '{printable(names[without.index(True)])}' is missing",
            "write 0 where a label does not apply",
        )
    return tuple(sorted(name for name, flag in zip(names, flags, strict=True) if flag))


def _of_lists(
    table: Table, name: str, values: list[Any], classes: Sequence[str] | None
) -> list[Names | None]:
    if at := _places(values):
        raise InputError(
            f"'{table.source}': the lists in column '{printable(name)}' hold {at} values of 0 and 1 each, a place a "
            "label, and do not name the labels",
            "write the names of the labels that a row has; or one column of 0 and 1 a label, and "
            "--columns labels=NAME+NAME",
        )
    found: list[Names | None] = []
    for i, value in enumerate(values):
        if value is None or value != value:
            found.append(None)
        elif not isinstance(value, list):
            raise InputError(
                f"{table.place(i)}: column '{printable(name)}' has {printable(repr(value))}, but lists in other rows",
                "write a list in every row, also of one label; [] where no label applies",
            )
        else:
            found.append(_set(_item(table, name, i, item, classes) for item in value))
    return found


def _places(values: list[Any]) -> int:
    """The length of all lists where they are 0 and 1 at the places of the labels; 0 where they are not."""
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    if len(lengths) > 1 or max(lengths) < 2:
        return 0
    same = all(isinstance(item, int | float) and item in (0, 1) for value in lists for item in value)
    return lengths.pop() if same else 0


def _item(table: Table, name: str, i: int, item: Any, classes: Sequence[str] | None) -> str:
    """One label of a list as text."""
    if classes is not None:
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(classes):
            return classes[item]
        raise InputError(
            f"{table.place(i)}: a list in column '{printable(name)}' has {printable(repr(item))}, but the file names "
            f"{len(classes)} classes"
        )
    if isinstance(item, str) and item.strip():
        return item.strip()
    whole = isinstance(item, int) or (isinstance(item, float) and item.is_integer())
    if whole and not isinstance(item, bool):
        return str(int(item))
    raise InputError(
        f"{table.place(i)}: a list in column '{printable(name)}' has {printable(repr(item))}; a label is a name or a "
        "whole number"
    )


def _of_cells(table: Table, name: str, values: list[Any], columns: Columns, where: str) -> list[Names | None]:
    """Cells of text, or whole numbers that are one label each."""
    classes = None if columns.ids else table.classes.get(name)
    found: list[Names | None] = []
    for i, value in enumerate(values):
        if value is None or value != value or (classes is not None and value == -1):
            found.append(None)
        elif isinstance(value, str) and classes is None:
            cell = [value] if columns.separator is None else value.split(columns.separator)
            found.append(_set(part.strip() for part in cell if part.strip()))
        else:
            found.append((_item(table, name, i, value, classes),))
    if not any(found):
        return [None] * len(values)
    counts = Counter(label for names in found if names for label in names)
    if classes is None and (several := several_labels(counts)) is not None:
        raise InputError(*undeclared(where, name, *several))
    if columns.ids:
        return [_ids(table, name, i, names) for i, names in enumerate(found)]
    _refuse_negative(table, name, found)
    return found


def _refuse_negative(table: Table, name: str, found: Sequence[Names | None]) -> None:
    """-1 and -100 stand for "not labelled" in other libraries: taken for a name, they would be learned."""
    for i, names in enumerate(found):
        for label in names or ():
            if _NEGATIVE.fullmatch(label):
                raise InputError(
                    f"{table.place(i)}: column '{printable(name)}' has {label}, which is no label",
                    "write nothing (null) for the labels of a row that nobody has labelled, and none, as [], where no "
                    "label applies",
                )


def _ids(table: Table, name: str, i: int, names: Names | None) -> Names | None:
    if names is None:
        return None
    numbers = [number_of(label) for label in names]
    for label, number in zip(names, numbers, strict=True):
        if number is None or number >= MAX_IDS:
            raise InputError(
                f"{table.place(i)}: column '{printable(name)}' has '{printable(label)}', which is not an id that a "
                "model's label can have",
                "leave ':ids' out of --columns",
            )
    return _set(map(str, numbers))


def _set(labels: Iterable[str]) -> Names:
    return tuple(sorted(set(labels)))
