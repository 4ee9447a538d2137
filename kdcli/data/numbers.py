"""A column of numbers, every value checked."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from kdcli.data.answers import MISSING, NUMBER, absent
from kdcli.data.tables import Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError
from kdcli.names import printable

_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")
_LARGEST = 3.4e38  # of float32, which models answer in


def read_numbers(table: Table, name: str, wanted: Wanted) -> list[float | None]:
    """The numbers of a column; all None where no row has one: nothing, or -1 in every row, as benchmarks hide answers.

    Args:
        table: The file.
        name: Its column.
        wanted: Who says that the answer is a number, for messages.

    Raises:
        InputError: A value is missing, not finite, or no number.
    """
    values = table.column(name)
    if table.classes.get(name) is not None:
        raise wanted.contradicted(
            f"'{table.source}': the label column '{printable(name)}' has classes, which the file names"
        )
    found = [_number(table, name, i, value, wanted) for i, value in enumerate(values)]
    missing = [i for i, number in enumerate(found) if number is None]
    if len(missing) == len(found) or all(number == -1 for number in found):
        return [None] * len(found)
    if missing:
        raise absent(table, name, "number", missing[0], len(missing))
    return found


def _number(table: Table, name: str, i: int, value: Any, wanted: Wanted) -> float | None:
    """One value; None where it is missing."""
    where = f"{table.place(i)}: the label in column '{printable(name)}'"
    if value is None or value != value:
        return None
    if isinstance(value, str):
        text = value.strip()
        if not text or text.casefold() in MISSING:
            return None
        if _COMMA.fullmatch(text):
            raise InputError(f"{where} is '{printable(text)}', with a comma", "write a decimal point: 2.5")
        if not NUMBER.fullmatch(text) and text.casefold().lstrip("+-") not in ("inf", "infinity"):
            raise wanted.contradicted(f"{where} is '{printable(text)}', which is not a number")
        number = float(text)
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = _LARGEST * 2 if isinstance(value, int) and abs(value) > _LARGEST else float(value)
    else:
        raise wanted.contradicted(f"{where} is {printable(repr(value))}, which is not a number")
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise InputError(
            f"{where} is {printable(str(value))}, which is not a finite number of 32 bits",
            "take the row out, or give it a number",
        )
    return number
