"""Read one file of labelled texts; every complaint names the file and the line."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.errors import InputError, UsageError, did_you_mean

SUFFIXES = (".csv", ".jsonl", ".parquet")
_LONGEST_FIELD = 1 << 24
_LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class Rows:
    """N rows: a text or a pair of texts each, and a label name unless they are unlabelled."""

    first: list[str]
    second: list[str] | None = None
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The given rows, in the given order."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[int(i)] for i in indices]

        first = pick(self.first)
        assert first is not None
        return Rows(first, pick(self.second), pick(self.labels))


@dataclass(frozen=True)
class Columns:
    """Names of the columns that matter; ``second`` is None for single texts."""

    first: str = "text"
    second: str | None = None
    label: str = "label"

    @property
    def names(self) -> list[str]:
        return [self.first] + ([self.second] if self.second else []) + [self.label]


def parse_columns(given: str | None) -> Columns | None:
    """Read ``text=sentence,label=intent`` or ``text_a=premise,text_b=hypothesis,label=gold``.

    Raises:
        UsageError: Another form, an unknown key, or half a pair.
    """
    if given is None:
        return None
    known = ("text", "text_a", "text_b", "label")
    pairs: dict[str, str] = {}
    for part in given.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value:
            raise UsageError(
                f"'{part}' in --columns is not KEY=COLUMN", "write it like text=sentence,label=intent"
            )
        if key not in known:
            raise UsageError(f"unknown key '{key}' in --columns: {did_you_mean(key, known)}")
        pairs[key] = value
    if ("text_b" in pairs) != ("text_a" in pairs) or ("text" in pairs and "text_a" in pairs):
        raise UsageError("--columns takes either text= or both text_a= and text_b=")
    first = pairs.get("text_a") or pairs.get("text", "text")
    return Columns(first, pairs.get("text_b"), pairs.get("label", "label"))


def read(
    path: Path, columns: Columns | None, *, labelled: bool = True
) -> list[tuple[int, str, str | None, str | None]]:
    """Read (line, first text, second text, label) of every row.

    Args:
        path: A .csv, .jsonl or .parquet file, or .txt without labels.
        columns: Column names; None finds ``text`` or ``text_a``/``text_b``, and ``label``.
        labelled: Whether a label is required; otherwise it is None throughout.

    Raises:
        InputError: The file is missing, empty, broken or lacks a column.
    """
    if not path.is_file():
        raise InputError(f"data file '{path}' does not exist or is not a file")
    suffix = path.suffix.lower()
    if suffix == ".txt" and not labelled:
        records: Iterator[tuple[int, dict[str, Any]]] = (
            (line, {"text": text}) for line, text in _lines(path) if text.strip()
        )
    elif suffix == ".csv":
        records = _csv(path)
    elif suffix == ".jsonl":
        records = _jsonl(path)
    elif suffix == ".parquet":
        records = _parquet(path)
    else:
        raise InputError(
            f"data file '{path}' has the suffix '{path.suffix}'; known are {', '.join(SUFFIXES)}"
        )
    rows = []
    chosen = columns
    for line, record in records:
        if chosen is None:
            chosen = _find(path, record, labelled)
        first = _text(path, line, record, chosen.first)
        second = _text(path, line, record, chosen.second) if chosen.second else None
        label = _label(path, line, record, chosen.label) if labelled else None
        rows.append((line, first, second, label))
    if not rows:
        raise InputError(f"data file '{path}' holds no rows")
    return rows


def _find(path: Path, record: dict[str, Any], labelled: bool) -> Columns:
    columns = Columns("text_a", "text_b") if "text_a" in record and "text_b" in record else Columns()
    for name in columns.names:
        if name not in record and (labelled or name != columns.label):
            raise InputError(
                f"data file '{path}' has no column '{name}': {did_you_mean(name, map(str, record))}",
                "name the columns: --columns text=COLUMN,label=COLUMN",
            )
    return columns


def _text(path: Path, line: int, record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise InputError(f"{path}:{line}: no column '{name}': {did_you_mean(name, map(str, record))}")
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}:{line}: column '{name}' holds no text (given: {value!r:.60})")
    return value


def _label(path: Path, line: int, record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise InputError(f"{path}:{line}: no column '{name}': {did_you_mean(name, map(str, record))}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise InputError(f"{path}:{line}: column '{name}' holds no label (given: {value!r:.60})")
    return str(value).strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines as text; a byte that is not UTF-8 is an error with its place."""
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(_LONGEST_LINE):
            number += 1
            if len(raw) == _LONGEST_LINE:
                raise InputError(f"{path}:{number}: the line is longer than {_LONGEST_LINE >> 20} MiB")
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8",
                    "save the file as UTF-8",
                ) from error


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = [name.strip() for name in row]
                if len(set(header)) != len(header):
                    raise InputError(f"{path}:1: the header names a column twice")
                continue
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path}:{reader.line_num}: {len(row)} fields, but the header has {len(header)}",
                    "put fields that contain a comma in double quotes",
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        yield number, record


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(path.read_bytes())) as file:
            row = 0
            for batch in file.iter_batches(batch_size=8192):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"data file '{path}' is not readable parquet: {str(error).splitlines()[0]}"
        ) from error
