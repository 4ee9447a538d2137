"""Text with separators: comma, semicolon, tab or vertical bar, quoted as spreadsheets and pandas do, or not at all.

The separator is not guessed from the texts. It is the one that makes the header hold the columns that are
needed; then every row must have as many fields as the header.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kdcli.data.tables import Table
from kdcli.errors import InputError

MAX_CHARACTERS = 1_000_000
"""The longest text accepted; far above any encoder's input, far below what a broken file can hold."""

NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_HEAD = 1 << 16  # characters that a header may have
_LOOKED_AT = 1000  # rows that tell the separator when no header holds the columns needed

Fits = Callable[[Sequence[str]], bool]
"""Whether a header has the columns that are needed."""


def parse(text: str, path: Path, fits: Fits, usual: str) -> Table:
    """Read separated text.

    Args:
        text: The content.
        path: Its file, for messages.
        fits: Whether a header has the columns that are needed.
        usual: The separator that the file's name stands for.

    Raises:
        InputError: Broken quoting, or a row with another number of fields than the header.
    """
    skipped = 0
    if text[:4].lower() == "sep=" and text[5:6] in ("\n", "\r"):  # a line for spreadsheets
        separator, (_, end, text) = text[4], text.partition("\n")
        skipped = 1 if end else 0
    else:
        separator = _separator(text, fits, usual)
    records, lines = (_tabs if separator == "\t" else _quoted)(text, path, separator)
    if not records:
        raise InputError(f"data file '{path}' is empty")
    header = [name.strip() for name in records[0]]
    return _table(header, records[1:], [line + skipped for line in lines[1:]], path, separator)


def parts(head: str, lines: Iterable[str], path: Path, fits: Fits, size: int) -> Iterator[Table] | None:
    """Read comma-separated text piece by piece; None where only the whole text tells how.

    Args:
        head: How the text begins, 65,536 characters where it has as many.
        lines: All lines, their ends included.
        path: Its file, for messages.
        fits: Whether a header has the columns that are needed.
        size: Rows of a piece.

    Raises:
        InputError: As :func:`parse`, once the piece is asked for.
    """
    separator = _separator(head, fits, ",")
    first = _first(head, separator, 1)
    if head[:4].lower() == "sep=" or not first or not fits([name.strip() for name in first[0]]):
        return None
    return _pieces(lines, path, separator, size)


def _pieces(lines: Iterable[str], path: Path, separator: str, size: int) -> Iterator[Table]:
    records = _records(lines, path, separator)
    header = [name.strip() for name in next(records)[0]]
    while piece := list(islice(records, size)):
        yield _table(header, [record for record, _ in piece], [line for _, line in piece], path, separator)


def _table(header: list[str], rows: list[list[str]], places: list[int], path: Path, separator: str) -> Table:
    """The rows of a header, all as wide as it is."""
    if len(header) > 1:  # a line of blanks alone is an empty line
        kept = [i for i, row in enumerate(rows) if len(row) > 1 or row[0].strip()]
        rows, places = [rows[i] for i in kept], [places[i] for i in kept]
    for line, row in zip(places, rows, strict=True):
        if len(row) != len(header):
            said = NAMES.get(separator, f"'{separator}'")
            raise InputError(
                f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}",
                f"the fields are separated by {said}; "
                + (
                    "put quotes around a text that holds one"
                    if len(row) > len(header)
                    else "a row has one for every column, also where a field is empty"
                ),
            )

    def column(name: str) -> list[Any]:
        at = header.index(name)
        return [row[at] for row in rows]

    return Table(str(path), header, places, column)


def _separator(text: str, fits: Fits, usual: str) -> str:
    order = [usual, *(s for s in NAMES if s != usual)]
    for separator in order:
        head = _first(text[:_HEAD], separator, 1)
        if head and fits([name.strip() for name in head[0]]):
            return separator
    # No header has them: the message shall at least name the right columns.
    widths = {s: _width(_first(text, s, _LOOKED_AT)) if s in text else 1 for s in order}
    return max(order, key=lambda s: widths[s])  # the first of equals


def _width(records: list[list[str]]) -> int:
    """Fields a row, 0 when rows differ."""
    widths = {len(record) for record in records}
    return widths.pop() if len(widths) == 1 else 0


def _first(text: str, separator: str, count: int) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        return list(islice(filter(None, reader), count))
    except csv.Error:
        return []


def _quoted(text: str, path: Path, separator: str) -> tuple[list[list[str]], list[int]]:
    found = list(_records(io.StringIO(text, newline=""), path, separator))
    return [record for record, _ in found], [line for _, line in found]


def _records(lines: Iterable[str], path: Path, separator: str) -> Iterator[tuple[list[str], int]]:
    """Records that are not empty, each with the line where it begins."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    start = 1
    # The limit is of the whole process; the module's default would refuse a long text.
    before = csv.field_size_limit(MAX_CHARACTERS)
    try:
        for record in reader:
            if record:
                yield record, start
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {start}: broken CSV ({error})", "look for a stray or unclosed quote"
        ) from error
    finally:
        csv.field_size_limit(before)


def _tabs(text: str, path: Path, separator: str) -> tuple[list[list[str]], list[int]]:
    """Tab-separated text, in which quotes either enclose fields or are part of the texts, as in GLUE's files.

    Where every line has as many tabs as the header, a line is a row, and the quotes enclose fields only if
    they are written as a program that quotes writes them. Read the other way round, a text that opens with a
    quote would swallow the rows after it.
    """
    raw = [
        (line.removesuffix("\r").split("\t"), number)
        for number, line in enumerate(text.split("\n"), 1)
        if line not in ("", "\r")
    ]
    plain = [fields for fields, _ in raw], [number for _, number in raw]
    if '"' not in text:
        return plain
    even = _width(plain[0]) > 0
    if even and not _encloses(plain[0]):
        return plain
    try:
        return _quoted(text, path, separator)
    except InputError:
        if even:
            return plain
        raise


def _encloses(records: list[list[str]]) -> bool:
    """Whether the quotes in these raw fields enclose them: no field has them otherwise, and they had a reason."""
    fields = [field for record in records for field in record]
    with_quotes = [field for field in fields if '"' in field]
    enclosed = [field for field in with_quotes if _is_enclosed(field)]
    if len(enclosed) < len(with_quotes):
        return False  # a writer that encloses fields encloses every one with a quote in it
    if any('""' in field[1:-1] for field in enclosed):
        return True
    words = [field for field in fields if not field.replace(".", "").removeprefix("-").isdigit()]
    if len(enclosed) == len(words):
        return True  # every text is enclosed
    # Spreadsheets enclose what holds a comma, between tabs too.
    return all("," in field for field in enclosed) and not any(
        "," in field for field in fields if '"' not in field
    )


def _is_enclosed(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
