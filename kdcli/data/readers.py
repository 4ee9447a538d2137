"""One data file (csv, jsonl, parquet) into rows; every complaint names the file and the line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data.labels import printable, suggest
from kdcli.errors import InputError, UsageError, did_you_mean

MAX_CHARACTERS = 1_000_000
"""The longest text accepted; far above any encoder's input, far below what a broken file can hold."""

_ROLES = ("text", "text_a", "text_b", "label")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """Texts, or pairs of texts, with their label names where they have any."""

    first: list[str]
    second: list[str] | None = None
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these positions, in this order."""
        picked = np.arange(len(self))[indices].tolist()

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[i] for i in picked]

        return Rows([self.first[i] for i in picked], pick(self.second), pick(self.labels))


@dataclass(frozen=True)
class Located:
    """Rows that remember where they came from, for messages."""

    rows: Rows
    source: str
    lines: Sequence[int]
    unit: str = "line"

    def place(self, i: int) -> str:
        return f"{self.source}, {self.unit} {self.lines[i]}"

    def take(self, indices: np.ndarray) -> Located:
        """The rows at these positions, in this order."""
        lines = [self.lines[i] for i in indices.tolist()]
        return Located(self.rows.take(indices), self.source, lines, self.unit)


@dataclass(frozen=True)
class Table:
    """A file's columns by name; ``column`` gives the values of one, one per entry of ``lines``."""

    source: str
    names: list[str]
    lines: Sequence[int]
    column: Callable[[str], list[Any]]
    unit: str = "line"

    def place(self, i: int) -> str:
        return f"{self.source}, {self.unit} {self.lines[i]}"


def parse_columns(given: str | None) -> dict[str, str]:
    """Parse ``text=sentence,label=intent`` into role -> column name.

    Raises:
        UsageError: Not of that form, an unknown role, a role given twice, or half a pair.
    """
    chosen: dict[str, str] = {}
    for part in given.split(",") if given is not None else ():
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not (role and equals and name):
            raise UsageError(
                f"'{printable(part)}' in --columns is not ROLE=NAME",
                "for example --columns text=sentence,label=intent",
            )
        if role not in _ROLES:
            raise UsageError(
                f"--columns names an unknown role '{printable(role)}': {did_you_mean(role, _ROLES)}"
            )
        if role in chosen:
            raise UsageError(f"--columns gives '{role}' twice")
        chosen[role] = name
    if ("text_a" in chosen) != ("text_b" in chosen) or {"text", "text_a"} <= set(chosen):
        raise UsageError("--columns takes either text=NAME, or both text_a=NAME and text_b=NAME")
    return chosen


def read(path: Path, chosen: Mapping[str, str], *, labelled: bool = True) -> Located:
    """Read the texts, and the labels, of one file.

    Args:
        path: A ``.csv``, ``.jsonl`` or ``.parquet`` file.
        chosen: Role -> column name, for roles whose column is not named like the role.
        labelled: Whether the label column is read.

    Raises:
        InputError: The file is not there, broken, empty, or lacks a column or a value.
    """
    return extract(read_table(path), chosen, labelled=labelled)


def read_table(path: Path) -> Table:
    """Open one file by its suffix; the values are checked when a column is read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"'{path}' is not a data file: {did_you_mean(path.suffix, READERS)}")
    table = reader(path)
    if not table.lines:
        raise InputError(f"data file '{path}' has no rows")
    return table


def extract(table: Table, chosen: Mapping[str, str], *, labelled: bool = True) -> Located:
    """Pick the text and label columns of a table and check every value."""
    pair = "text_a" in chosen
    if "text" not in chosen and "text" not in table.names and "text_a" in table.names:
        pair = True
    roles = ("text_a", "text_b") if pair else ("text",)
    first, *second = (_texts(table, _named(table, role, chosen)) for role in roles)
    labels = _labels(table, _named(table, "label", chosen)) if labelled else None
    rows = Rows(first, second[0] if second else None, labels)
    return Located(rows, table.source, table.lines, table.unit)


def _named(table: Table, role: str, chosen: Mapping[str, str]) -> str:
    name = chosen.get(role, role)
    if name not in table.names:
        raise InputError(
            f"'{table.source}' has no column '{printable(name)}': {suggest(name, table.names)}",
            "name the columns with --columns text=NAME,label=NAME (or text_a=NAME,text_b=NAME,label=NAME)",
        )
    if (count := table.names.count(name)) > 1:
        raise InputError(f"'{table.source}' has {count} columns named '{printable(name)}'")
    return name


def _texts(table: Table, name: str) -> list[str]:
    values = table.column(name)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            found = "is missing" if value is None else f"is {type(value).__name__}, not text"
            raise InputError(f"{table.place(i)}: the text in column '{printable(name)}' {found}")
        _check(value, table, i, name)
    return values


def _labels(table: Table, name: str) -> list[str]:
    labels: list[str] = []
    for i, value in enumerate(table.column(name)):
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int):
            value = str(value)
        elif value is not None and not isinstance(value, str):
            raise InputError(
                f"{table.place(i)}: the label in column '{printable(name)}' is {type(value).__name__}; "
                "a label is a name or a whole number"
            )
        value = (value or "").strip()
        if not value:
            raise InputError(f"{table.place(i)}: the label in column '{printable(name)}' is missing")
        _check(value, table, i, name)
        labels.append(value)
    return labels


def _check(value: str, table: Table, i: int, name: str) -> None:
    if len(value) > MAX_CHARACTERS:
        raise InputError(
            f"{table.place(i)}: column '{printable(name)}' has {len(value)} characters; "
            f"at most {MAX_CHARACTERS} are read"
        )
    if _SURROGATE.search(value):
        raise InputError(f"{table.place(i)}: column '{printable(name)}' holds half of a surrogate pair")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file: no directory, pipe or device, which might never end."""
    if not path.is_file():
        raise InputError(
            f"data file '{path}' " + ("is not a regular file" if path.exists() else "does not exist")
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read data file '{path}': {error.strerror}") from error
    if not data:
        raise InputError(f"data file '{path}' is empty")
    return data


def decode(data: bytes, path: Path) -> str:
    """UTF-8 with or without a byte order mark.

    Raises:
        InputError: Not UTF-8; names the line and the byte.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            "save the file as UTF-8",
        ) from error


def _csv(path: Path) -> Table:
    text = decode(read_bytes(path), path)
    records: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    # The limit is of the whole process; the module's default would refuse a long text.
    before = csv.field_size_limit(MAX_CHARACTERS)
    try:
        for record in reader:
            if record:
                records.append(record)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {start}: broken CSV ({error})", "look for a stray or unclosed quote"
        ) from error
    finally:
        csv.field_size_limit(before)
    if not records:
        raise InputError(f"data file '{path}' is empty")
    header = [name.strip() for name in records[0]]
    rows, places = records[1:], lines[1:]
    for line, row in zip(places, rows, strict=True):
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}",
                "put quotes around a text with a comma",
            )

    def column(name: str) -> list[Any]:
        at = header.index(name)
        return [row[at] for row in rows]

    return Table(str(path), header, places, column)


def _jsonl(path: Path) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    # Not splitlines(): a JSON string may hold U+2028, which is no end of a line here.
    for number, line in enumerate(decode(read_bytes(path), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise InputError(f"{path}, line {number}: not JSON ({reason})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: {type(record).__name__} instead of a JSON object")
        records.append(record)
        lines.append(number)

    def column(name: str) -> list[Any]:
        return [record.get(name) for record in records]

    return Table(str(path), list(dict.fromkeys(chain.from_iterable(records))), lines, column)


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_bytes(path)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names, count = list(file.schema_arrow.names), int(file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a readable parquet file: {first_line(error)}") from error

    def column(name: str) -> list[Any]:
        try:
            return file.read(columns=[name]).column(name).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"'{path}': can't read column '{printable(name)}': {first_line(error)}"
            ) from error

    return Table(str(path), names, range(1, count + 1), column, "row")


def first_line(error: Exception) -> str:
    """What another library says of an error, on one printable line."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)


READERS: dict[str, Callable[[Path], Table]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
