"""A label column into names: numbers and truth values in one spelling, -1 as no label, and what is no class.

Refused, because a classifier of these would answer another question: scores, and several labels a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from kdcli.data.columns import SEPARATORS
from kdcli.data.labels import number_of, plain
from kdcli.data.tables import Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError
from kdcli.names import listed, printable

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_NONE = "-1"
_FEW = 0.1
"""A share of rows up to which -1 beside 0, 1, ... is taken for "no label", as in SNLI; a class of its own
such as "negative" beside neutral 0 and positive 1 has more."""
_MANY_VALUES = 20
MAX_IDS = 1 << 16
MISSING = ("nan", "null", "none", "na", "n/a")


def read_labels(table: Table, name: str, *, ids: bool, wanted: Wanted | None = None) -> list[str | None]:
    """The label names of a column, None for a row without a label.

    Args:
        table: The file.
        name: Its label column.
        ids: The labels are numbers of the model's own list.
        wanted: Who says that a row has one label, for messages.

    Returns:
        The labels. Where no row at all has one, all are None.

    Raises:
        InputError: A label is missing or of no kind that a label can have; the column holds scores, or
            several labels a row.
    """
    wanted = wanted or Wanted("one-of")
    values = table.column(name)
    at = next((i for i, value in enumerate(values) if isinstance(value, list | dict)), None)
    if at is not None:
        what = "is a list, as of several labels" if isinstance(values[at], list) else "is an object"
        raise wanted.contradicted(
            f"{table.place(at)}: the label in column '{printable(name)}' {what}",
            f"write one label in every row, or learn several at once: {wanted.other('any-of')}",
        )
    classes = None if ids else table.classes.get(name)
    if classes is not None:
        return _of_classes(table, name, values, classes)
    found = Counter(zip(map(type, values), values, strict=True))
    spelled = {key: _spelled(table, name, values, *key) for key in found}
    if all(label is None for label in spelled.values()):
        return [None] * len(values)
    missing = [key for key, label in spelled.items() if label is None]
    if missing:
        at = min(values.index(value) if value == value else _first_nan(values) for _, value in missing)
        raise absent(table, name, "label", at, sum(found[key] for key in missing))
    counts: Counter[str] = Counter()
    for key, label in spelled.items():
        counts[str(label)] += found[key]
    final = _settled(table, name, counts, ids, wanted)
    result = {key: final[str(label)] for key, label in spelled.items()}
    return [result[key] for key in zip(map(type, values), values, strict=True)]


def absent(table: Table, name: str, what: str, at: int, count: int) -> InputError:
    """A value is missing in ``count`` rows, the first of them at ``at``."""
    return InputError(
        f"{table.place(at)}: the {what} in column '{printable(name)}' is missing"
        + (f", as in {count - 1} further rows" if count > 1 else ""),
        f"give these rows a {what}, or take them out",
    )


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether a column holds numbers, written as such or as text."""
    return _fractions(values) is not None


def are_scores(values: Iterable[Any]) -> bool:
    """Whether a column holds numbers that are no classes for certain: one of them has a fraction."""
    return bool(_fractions(values))


def _fractions(values: Iterable[Any]) -> bool | None:
    """Whether one of a column's numbers has a fraction; None where something in it is no number, or all is missing."""
    broken: bool | None = None
    for value in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
            return None
        number = float(value)
        broken = bool(broken) or not (number.is_integer() or number != number)
    return broken


def _first_nan(values: list[Any]) -> int:
    return next(i for i, value in enumerate(values) if value != value)


def _of_classes(table: Table, name: str, values: list[Any], classes: Any) -> list[str | None]:
    """Class numbers by their names; -1, and nothing, are the format's ways to say "no label"."""
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, int) and -1 <= value < len(classes)):
            raise InputError(
                f"{table.place(i)}: column '{printable(name)}' has {printable(repr(value))}, "
                f"but the file names {len(classes)} classes"
            )
    return [None if value is None or value < 0 else classes[value] for value in values]


def _spelled(table: Table, name: str, values: list[Any], kind: type, value: Any) -> str | None:
    """One value as text; None where it is missing."""
    if value is None or (kind is float and math.isnan(value)):
        return None
    if kind is str:
        return value.strip() or None
    if kind is bool:
        return "true" if value else "false"
    if kind is float and value.is_integer():
        return str(int(value))
    if kind in (int, float):
        return str(value)
    raise InputError(
        f"{table.place(values.index(value))}: the label in column '{printable(name)}' is {kind.__name__}; "
        "a label is a name or a whole number"
    )


def _settled(
    table: Table, name: str, counts: Counter[str], ids: bool, wanted: Wanted
) -> Mapping[str, str | None]:
    """What each spelling means; None for no label."""
    rows = counts.total()
    where = f"'{table.source}': the label column '{printable(name)}'"
    words = [label for label in counts if not NUMBER.fullmatch(label)]
    if 0 < len(words) < len(counts) and all(label.casefold() in MISSING for label in words):
        raise InputError(
            f"{where} has '{printable(words[0])}' beside numbers, in {sum(counts[w] for w in words)} rows: "
            "these labels are missing",
            "give these rows a label, or take them out",
        )
    if all(NUMBER.fullmatch(label) for label in counts):
        _refuse_scores(where, counts, wanted)
        whole = {label: plain(label) for label in counts}
    elif all(label.casefold() in ("true", "false") for label in counts):
        whole = {label: label.casefold() for label in counts}
    else:
        whole = {label: label for label in counts}
        _refuse_several(where, name, counts, wanted)
        points = Counter({label.replace(",", "."): count for label, count in counts.items()})
        if all(NUMBER.fullmatch(label) for label in points):
            _refuse_scores(where, points, wanted)  # with the comma of other countries
    if ids:
        for label in whole.values():
            if label != _NONE and not 0 <= (-1 if (n := number_of(label)) is None else n) < MAX_IDS:
                raise InputError(
                    f"{where} has '{printable(label)}', which is not an id that a model's label can have",
                    "leave ':ids' out of --columns",
                )
        whole = {k: v if v == _NONE else str(number_of(v)) for k, v in whole.items()}
    without = sum(count for label, count in counts.items() if whole[label] == _NONE)
    others = {label for label in whole.values() if label != _NONE}
    # 1 beside -1 are two classes; -1 beside 0, 1, ... is how data sets write "no label".
    if without and (ids or not others or ("0" in others and all(number_of(x) is not None for x in others))):
        if not ids and others and without > _FEW * rows:
            raise InputError(
                f"{where} has -1 in {without} of {rows} rows beside {listed(sorted(others))}: it may be a "
                "class, or stand for no label",
                "write the classes as names; or, where -1 is no label and the others are the model's ids: "
                f"--columns label={printable(name)}:ids",
            )
        return {label: None if other == _NONE else other for label, other in whole.items()}
    return whole


def _refuse_scores(where: str, counts: Counter[str], wanted: Wanted) -> None:
    numbers = sorted({float(label) for label in counts})
    broken = [number for number in numbers if not number.is_integer()]
    # Numbers of classes are few, come back, or leave no gaps.
    gaps = numbers[-1] - numbers[0] + 1 > len(numbers)
    singular = len(numbers) > _MANY_VALUES and 2 * len(numbers) > counts.total() and gaps
    if broken or singular:
        some = ", ".join(f"{number:g}" for number in numbers[:4])
        raise wanted.contradicted(
            f"{where} looks like scores (regression), not classes: {len(numbers)} different numbers, "
            f"from {numbers[0]:g} to {numbers[-1]:g} ({some}, ...)",
            f"to learn the numbers (with a decimal point): {wanted.other('number')}; for classes of these scores "
            "write a column with their names",
        )


def several_labels(counts: Counter[str]) -> tuple[str, str] | None:
    """A cell that seems to hold several labels, and what separates them; a name that happens to hold a comma is none.

    The separator is ``[`` where cells are written lists.
    """
    bracketed = [label for label in counts if label[:1] == "[" and label[-1:] == "]"]
    if 2 * sum(counts[label] for label in bracketed) > counts.total():
        return bracketed[0], "["
    for separator in SEPARATORS:
        parts = {
            label: [part.strip() for part in label.split(separator)] for label in counts if separator in label
        }
        several = {label: names for label, names in parts.items() if len(set(names)) > 1 and all(names)}
        if several and _come_back(several, set(counts), separator):
            return next(iter(several)), separator
    return None


def undeclared(where: str, name: str, example: str, separator: str) -> tuple[str, str]:
    """The message and the hint of a column whose cells hold several labels though nothing says so."""
    if separator == "[":
        return (
            f"{where} holds lists, such as {printable(example)}",
            "write JSON lines or parquet, in which a list is a list; or the labels of a row separated by ';', and "
            f"--columns 'labels={printable(name)}:sep=;'",
        )
    return (
        f"{where} holds several labels a row, such as '{printable(example)}', whose parts are labels of other rows",
        f"to learn several at once, say what separates them: --columns 'labels={printable(name)}:sep={separator}'",
    )


def _refuse_several(where: str, name: str, counts: Counter[str], wanted: Wanted) -> None:
    """Refuse cells with several labels."""
    if (found := several_labels(counts)) is not None:
        message, hint = undeclared(where, name, *found)
        raise wanted.contradicted(message, hint)


def _come_back(several: Mapping[str, list[str]], labels: set[str], separator: str) -> bool:
    """Whether at least half of the composed labels are made of parts that are labels elsewhere too.

    A part is one where it stands alone. Between ; and |, which are rare in names, it is also enough that it
    stands in another composed label, unless every part keeps its place: then the labels are paths.
    """
    alone = sum(all(part in labels for part in names) for names in several.values())
    if 2 * alone >= len(several):
        return True
    if separator == ",":
        return False
    places = {(part, i) for names in several.values() for i, part in enumerate(names)}
    paths = len({len(names) for names in several.values()}) == 1 and len(places) == len(
        {p for p, _ in places}
    )
    uses = Counter(part for names in several.values() for part in set(names))
    again = sum(all(uses[part] > 1 or part in labels for part in names) for names in several.values())
    return not paths and 2 * again >= len(several)
