"""Lines of a stream as they arrive: what is there is handed on at once, and no more than that is held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from kdcli.errors import InputError

ROWS = 1024
"""The most lines that are handed on together."""
_BLOCK = 1 << 18  # bytes asked for at once
_LONGEST = 4 << 20  # bytes of a line; of a text at most a million characters are read


class Arriving(Protocol):
    """A binary stream that gives what it has and does not wait for more."""

    def read1(self, size: int = ..., /) -> bytes:
        """At most ``size`` bytes after at most one read; none at the end."""
        ...


class LineBlock(NamedTuple):
    """Lines without their ends."""

    first: int  # number of the first one, from 1
    lines: list[str]


def parts(stream: Arriving, source: str) -> Iterator[LineBlock]:
    """Read UTF-8 up to its end.

    Args:
        stream: Where the bytes come from.
        source: Its name, for messages.

    Raises:
        InputError: Bytes that are not UTF-8, or a line that does not end; names the line.
    """
    rest, number = b"", 1
    while data := stream.read1(_BLOCK):
        *whole, rest = (rest + data).split(b"\n")
        yield from _decoded(whole, number, source)
        number += len(whole)
        if len(rest) > _LONGEST:
            raise InputError(f"{source}, line {number}: more than {_LONGEST >> 20} MiB without an end")
    if rest:
        yield from _decoded([rest], number, source)


def _decoded(lines: list[bytes], first: int, source: str) -> Iterator[LineBlock]:
    for start in range(0, len(lines), ROWS):
        found = []
        for number, line in enumerate(lines[start : start + ROWS], first + start):
            try:
                text = line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{source}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x})",
                    "convert it: iconv -f latin1 -t utf-8",
                ) from error
            found.append(text)
        yield LineBlock(first + start, found)


def are_json(part: LineBlock) -> bool:
    """Whether a stream that begins so holds a JSON object a line."""
    return re.match(r"\s*\{", "\n".join(part.lines)) is not None
