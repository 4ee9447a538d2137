"""Texts without labels, part by part: how many rows a source has does not matter to memory.

CSV, JSON lines and plain lines are read as they come. Of the other forms the file is read as a whole.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from kdcli.data import delimited, files, lines, objects
from kdcli.data.columns import Columns, complete, named, settled, text_roles
from kdcli.data.lines import LineBlock
from kdcli.data.readers import extract
from kdcli.data.tables import Located, Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError, UsageError, first_line
from kdcli.tasks.task import Kind

_HEAD = 1 << 16  # characters from which the separator is told
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def of_lines(parts: Iterable[LineBlock], source: str, columns: Columns, kind: Kind) -> Iterator[Located]:
    """The rows of a stream of lines: each is a text, or where the first one begins with ``{`` a JSON object.

    Args:
        parts: As :func:`kdcli.data.lines.parts` gives them.
        source: Their name, for messages.
        columns: The columns that are not named like their role.
        kind: Of the answers: where they are numbers, a query and its text are a pair.

    Raises:
        InputError: A line is no JSON object, or lacks a text; names the line.
        UsageError: Columns of plain lines, which have none.
    """
    given = iter(parts)
    first = next(given, None)
    if first is None:
        return iter(())
    parts = chain([first], given)
    if lines.are_json(first):
        return _rows(
            (objects.of_lines(part.lines, part.first, Path(source)) for part in parts), columns, kind
        )
    return _plain(parts, source, columns, kind)


def of_file(path: Path, columns: Columns, kind: Kind) -> Iterator[Located]:
    """The rows of a file: ``.txt`` with a text a line, or any form of :mod:`kdcli.data.files`; none of an empty one.

    Raises:
        InputError: The file is not there or broken, or a row lacks a text; names the line.
        UsageError: Columns of a ``.txt``, which has none.
    """
    ending, _ = files.form_of(path)
    if path.is_file() and not path.stat().st_size:
        return iter(())
    if ending == ".txt":
        return _plain(_of_stream(path), str(path), columns, kind)
    tables = {".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines}.get(ending, _whole)(path, columns)
    return _rows(tables, columns, kind)


def of_texts(texts: Iterable[str | Sequence[str]]) -> Iterator[Located]:
    """The rows of a list: texts, or pairs of texts.

    Raises:
        InputError: One is neither, or not what the first one is; names its place.
    """
    first = 1
    given = iter(texts)
    pairs: bool | None = None
    while part := [text for _, text in zip(range(lines.ROWS), given, strict=False)]:
        pairs = not isinstance(part[0], str) if pairs is None else pairs
        places = range(first, first + len(part))
        for place, text in zip(places, part, strict=True):
            if pairs and (isinstance(text, str) or not isinstance(text, Sequence) or len(text) != 2):
                raise InputError(f"texts, entry {place}: not a pair of texts, as the first entry is")
        names = ["text_a", "text_b"] if pairs else ["text"]
        table = Table("texts", names, places, _columns(part, pairs), "entry")
        yield extract(table, Columns(), Wanted("one-of"), labelled=False)
        first += len(part)


def _columns(part: Sequence[Any], pairs: bool) -> Callable[[str], list[Any]]:
    return lambda name: [text[name == "text_b"] for text in part] if pairs else list(part)


def _rows(tables: Iterable[Table], columns: Columns, kind: Kind) -> Iterator[Located]:
    """What of each table is text; the columns are those of the first one."""
    chosen: Columns | None = None
    for table in tables:
        if not table.lines:
            continue
        if chosen is None:
            if "query" in columns.names:
                extract(table, columns, Wanted(kind, "the model"), labelled=False)  # refuses what cannot be
            found = settled(table, columns, kind)
            chosen = Columns({role: named(table, role, found) for role in text_roles(table.names, found)})
        for start in range(0, len(table.lines), lines.ROWS):
            yield extract(_part(table, start), chosen, Wanted("one-of"), labelled=False)


def _part(table: Table, start: int) -> Table:
    if len(table.lines) <= lines.ROWS:
        return table
    part = slice(start, start + lines.ROWS)
    return Table(
        table.source, table.names, table.lines[part], lambda name: table.column(name)[part], table.unit
    )


def _plain(parts: Iterable[LineBlock], source: str, columns: Columns, kind: Kind) -> Iterator[Located]:
    if columns.names:
        raise UsageError(f"--columns does not apply to {source}, whose lines are texts", "leave it out")

    def tables() -> Iterator[Table]:
        for first, texts in parts:
            yield Table(source, ["text"], range(first, first + len(texts)), lambda _, texts=texts: texts)  # type: ignore[misc]

    return _rows(tables(), columns, kind)


def _of_stream(path: Path) -> Iterator[LineBlock]:
    with _opened(path) as stream:
        try:
            yield from lines.parts(cast("lines.Arriving", stream), str(path))
        except (OSError, EOFError) as error:
            raise InputError(f"'{path}' can't be read: {first_line(error)}") from error


def _opened(path: Path) -> IO[bytes]:
    if not path.is_file():
        files.read_bytes(path)  # raises
    try:
        return cast("IO[bytes]", gzip.open(path)) if files.form_of(path)[1] else path.open("rb")
    except OSError as error:
        raise InputError(f"can't read data file '{path}': {error.strerror}") from error


def _whole(path: Path, columns: Columns) -> Iterator[Table]:
    yield _once(files.read_table(path, _fits(columns), empty=True))


def _once(table: Table) -> Table:
    """The same, with every column read once: a part of one would read the file again."""
    read: dict[str, list[Any]] = {}

    def column(name: str) -> list[Any]:
        if name not in read:
            read[name] = table.column(name)
        return read[name]

    return Table(table.source, table.names, table.lines, column, table.unit, table.classes)


def _json_lines(path: Path, columns: Columns) -> Iterator[Table]:
    parts = _of_stream(path)
    first = next(parts, None)
    seen = [line for line in ([] if first is None else first.lines) if line.strip()]
    if first is None or len(seen) < 2 or not objects.is_object(seen[0]):
        # One object may hold all rows, and an array or objects over several lines have no rows a line.
        parts.close()  # type: ignore[attr-defined]
        yield from _whole(path, columns)
        return
    for part in chain([first], parts):
        yield objects.of_lines(part.lines, part.first, path)


def _csv(path: Path, columns: Columns) -> Iterator[Table]:
    with _opened(path) as stream:
        try:
            start = stream.read(4)
            stream.seek(0)
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            head = "" if start[:2] in _UTF16 else text.read(_HEAD)
            if "\0" not in head[:200] and head:
                text.seek(0)
                found = delimited.parts(head, text, path, _fits(columns), lines.ROWS)
                if found is not None:
                    yield from found
                    return
        except UnicodeDecodeError:
            pass  # the reader of whole files says which line it is
        except (OSError, EOFError) as error:
            raise InputError(f"'{path}' can't be read: {first_line(error)}") from error
    # Two bytes a character, a line for spreadsheets, no such columns: read, or refused, with the words of any stage.
    yield from _whole(path, columns)


def _fits(columns: Columns) -> delimited.Fits:
    return lambda names: complete(names, columns, labelled=False)
