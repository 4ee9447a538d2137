"""JSON into rows: an object a line, objects one after the other, an array of them, or columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from kdcli.data.tables import Table
from kdcli.errors import InputError
from kdcli.names import listed

_BLANK = " \t\r\n"


def parse(text: str, path: Path) -> Table:
    """Read JSON whatever its layout, because .json and .jsonl are both used for all of them.

    Raises:
        InputError: Not JSON, or no rows of objects; names the line or the entry.
    """
    start = len(text) - len(text.lstrip(_BLANK))
    if text[start : start + 1] == "[":
        return _array(_document(text, path), path)
    first = text[start:].partition("\n")[0]
    if not is_object(first):
        return _sequence(text, path)
    # Not splitlines(): a JSON string may hold U+2028, which is no end of a line here.
    records, lines = _lines(text.split("\n"), path)
    if len(records) == 1 and (table := _whole(records[0], path)) is not None:
        return table
    return _table(path, records, lines, "line")


def of_lines(lines: Sequence[str], first: int, path: Path) -> Table:
    """Read an object a line from a part of a file; blank lines are passed over.

    Args:
        lines: The part.
        first: The number of its first line in the file.
        path: The file, for messages.

    Raises:
        InputError: A line is no JSON object.
    """
    return _table(path, *_lines(lines, path, first), "line")


def is_object(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(given: Sequence[str], path: Path, first: int = 1) -> tuple[list[dict[str, Any]], list[int]]:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(given, first):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({_reason(error)})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: {type(record).__name__} instead of a JSON object")
        records.append(record)
        lines.append(number)
    return records, lines


def _sequence(text: str, path: Path) -> Table:
    """Objects over several lines each, one after the other; one alone may hold the columns."""
    decoder = json.JSONDecoder()
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    at, line, seen = 0, 1, 0
    while True:
        while at < len(text) and text[at] in _BLANK:
            at += 1
        if at == len(text):
            break
        line, seen = line + text.count("\n", seen, at), at
        try:
            record, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise InputError(f"{path}, line {where}: not JSON ({_reason(error)})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {line}: {type(record).__name__} instead of a JSON object")
        records.append(record)
        lines.append(line)
        at = end
    if len(records) == 1 and (table := _whole(records[0], path)) is not None:
        return table
    return _table(path, records, lines, "line")


def _document(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise InputError(f"{path}, line {line}: not JSON ({_reason(error)})") from error


def _array(records: list[Any], path: Path) -> Table:
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise InputError(f"{path}, entry {number}: {type(record).__name__} instead of a JSON object")
    return _table(path, records, range(1, len(records) + 1), "entry")


def _whole(record: dict[str, Any], path: Path) -> Table | None:
    """An object that holds a whole file; None for one that is a row.

    It holds the rows in one of its lists, or it is of columns: lists of equal length, or, as pandas writes
    them by default, objects with equal keys; or, as pandas splits them, the names apart from the values.
    """
    names, values = record.get("columns"), record.get("data")
    if isinstance(names, list) and isinstance(values, list):
        split = [dict(zip(map(str, names), x, strict=False)) for x in values if isinstance(x, list)]
        if split and all(isinstance(x, list) and len(x) == len(names) for x in values):
            return _array(split, path)
    rows = [v for v in record.values() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    if len(rows) == 1:
        return _array(rows[0], path)
    if len(rows) > 1:
        names = [k for k, v in record.items() if any(v is one for one in rows)]
        raise InputError(
            f"'{path}' holds several lists of rows: {listed(names)}",
            "write each list into a file of its own, such as train.json and test.json in one folder",
        )
    columns = {k: list(v.values()) if isinstance(v, dict) else v for k, v in record.items()}
    if not columns or not all(isinstance(v, list) for v in columns.values()):
        return None
    if len({tuple(v) if isinstance(v, dict) else len(v) for v in record.values()}) > 1:
        return None
    count = len(next(iter(columns.values())))
    return Table(str(path), list(columns), range(1, count + 1), lambda name: columns[name], "entry")


def _table(path: Path, records: list[dict[str, Any]], lines: Any, unit: str) -> Table:
    def column(name: str) -> list[Any]:
        return [record.get(name) for record in records]

    return Table(str(path), list(dict.fromkeys(chain.from_iterable(records))), lines, column, unit)


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
