"""A data file by its name: which forms are read, what is unpacked, and what is refused with a way to go on."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

from kdcli.data import arrow, delimited, objects
from kdcli.data.delimited import Fits
from kdcli.data.tables import Table
from kdcli.errors import InputError, did_you_mean, first_line

MAX_UNPACKED = 4 << 30
"""Bytes that a packed file may have when unpacked."""
_SUSPICIOUS = 64 << 20  # from here on a file that shrank more than text does is taken for a bomb
_RATIO = 200
_PIECE = 1 << 20

_FORMS: dict[str, Callable[[bytes, Path, Fits], Table]] = {
    ".csv": lambda data, path, fits: delimited.parse(decode(data, path), path, fits, ","),
    ".tsv": lambda data, path, fits: delimited.parse(decode(data, path), path, fits, "\t"),
    ".json": lambda data, path, fits: objects.parse(decode(data, path), path),
    ".jsonl": lambda data, path, fits: objects.parse(decode(data, path), path),
    ".ndjson": lambda data, path, fits: objects.parse(decode(data, path), path),
    ".parquet": lambda data, path, fits: arrow.parquet(data, path),
}
FORMS: tuple[str, ...] = tuple(_FORMS)
"""Endings that are read; all but parquet also with .gz behind them."""

_UNPACK = "unpack it first; of packed files only .gz is read"
_SHEET = "save the sheet as CSV (UTF-8)"
REFUSED: dict[str, str] = {
    **dict.fromkeys((".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), _SHEET),
    ".arrow": "give the folder that save_to_disk wrote, or save it as parquet",
    ".feather": "save it as parquet",
    **dict.fromkeys((".pkl", ".pickle"), "pickle files are never opened: save it as parquet or CSV"),
}
"""Endings that people have and that are not read, with what to do."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC = {b"\x1f\x8b": "packed by gzip: name it with .gz at the end", b"PK\x03\x04": f"a zip file: {_UNPACK}"}


def form_of(path: Path) -> tuple[str, bool]:
    """The ending that says what a file holds, in lower case, and whether it is packed by gzip.

    >>> form_of(Path("Train.CSV.gz"))
    ('.csv', True)
    """
    ending = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), True) if ending == ".gz" else (ending, False)


def stem_of(path: Path) -> str:
    """The name without its endings, in lower case.

    >>> stem_of(Path("Train.CSV.gz"))
    'train'
    """
    name = path.name.lower()
    for ending in (".gz", *REFUSED):
        name = name.removesuffix(ending)
    for ending in FORMS:
        name = name.removesuffix(ending)
    return name


def read_table(path: Path, fits: Fits, *, empty: bool = False) -> Table:
    """Open one file by its ending; the values are checked when a column is read.

    Args:
        path: The file.
        fits: Whether a header has the columns that are needed.
        empty: Whether it may have no rows.

    Raises:
        InputError: The file is not there, broken, empty or of a form that is not read.
    """
    ending, packed = form_of(path)
    if ending in REFUSED:
        raise InputError(f"'{path}': {ending} files are not read", REFUSED[ending])
    if ending not in _FORMS or (packed and ending == ".parquet"):
        raise InputError(
            f"'{path}' is not a data file: {did_you_mean(ending, FORMS)}",
            "parquet is packed by itself: gunzip it" if packed and ending == ".parquet" else None,
        )
    table = _FORMS[ending](read_bytes(path), path, fits)
    if not table.lines and not empty:
        raise InputError(f"data file '{path}' has no rows")
    return table


def read_bytes(path: Path) -> bytes:
    """The content of a regular file, unpacked: no directory, pipe or device, which might never end."""
    if not path.is_file():
        raise InputError(
            f"data file '{path}' " + ("is not a regular file" if path.exists() else "does not exist")
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read data file '{path}': {error.strerror}") from error
    if data.startswith(_POINTER):
        raise InputError(
            f"'{path}' is a pointer of Git LFS, not the file itself", "fetch it: git lfs pull, in that clone"
        )
    if form_of(path)[1]:
        data = _unpack(data, path)
    if not data:
        raise InputError(f"data file '{path}' is empty")
    return data


def _unpack(data: bytes, path: Path) -> bytes:
    import io

    found = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while piece := stream.read(_PIECE):
                found += piece
                bomb = len(found) > _SUSPICIOUS and len(found) > _RATIO * len(data)
                if bomb or len(found) > MAX_UNPACKED:
                    raise InputError(
                        f"'{path}' holds more than {len(found) >> 20} MiB, packed into {len(data)} bytes",
                        "if that is right, unpack it yourself",
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' can't be unpacked: {first_line(error)}") from error
    return bytes(found)


def decode(data: bytes, path: Path) -> str:
    """UTF-8, or UTF-16 with a byte order mark as spreadsheets write it.

    Raises:
        InputError: Neither; names the line and the byte.
    """
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise InputError(f"'{path}' is {what}")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not {encoding.upper()} "
            f"(byte 0x{data[error.start]:02x} at offset {error.start})",
            "save the file as UTF-8",
        ) from error
    if "\0" in text[:200]:
        raise InputError(f"'{path}' is not text, or UTF-16 without a byte order mark", "save it as UTF-8")
    return text
