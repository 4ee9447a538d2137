"""stdin and stdout: a stage reads one line and writes one line; nothing else may reach stdout."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from kdcli.errors import UsageError


def open_missing() -> None:
    """Open closed standard descriptors on the null device.

    Otherwise the next file that is opened would become descriptor 1, and a library's print would go into it.
    """
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def references(given: str) -> list[str]:
    """A model reference, or for ``-`` the lines of stdin.

    Raises:
        UsageError: stdin is a terminal, empty, or holds something else than references.
    """
    if given != "-":
        return [given]
    if sys.stdin.isatty():
        raise UsageError(
            "'-' reads a model from stdin, but stdin is a terminal",
            "pipe a stage into this one, or name the model; --help shows how",
        )
    lines = [line.strip() for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise UsageError(
            "'-' was given, but stdin is empty",
            "the stage before failed or missed a gate: see its message above",
        )
    if lines[0].startswith(("{", "[")):
        raise UsageError("stdin holds JSON, not a directory", "call the stage before without --json")
    return lines


def reference(given: str) -> str:
    """One model reference; see :func:`references`.

    Raises:
        UsageError: stdin holds several lines.
    """
    found = references(given)
    if len(found) > 1:
        raise UsageError(f"stdin holds {len(found)} lines, this command takes one model")
    return found[0]


@contextlib.contextmanager
def guarded() -> Iterator[TextIO]:
    """Send everything that is printed inside the block to stderr; yield the real stdout for the result.

    The descriptor is redirected too, because onnxruntime and other native code do not ask ``sys.stdout``.
    """
    real = sys.stdout
    real.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        number = real.fileno()
    except (OSError, ValueError):  # a test runner's stream
        number = -1
    result = real
    if number == 1:
        result = open(saved, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield result
    finally:
        with contextlib.suppress(OSError):
            os.dup2(saved, 1)
            os.close(saved)


def put(stream: TextIO, text: str) -> bool:
    """Write the result; a reader that has gone away is no error of ours.

    Returns:
        Whether somebody still reads.
    """
    try:
        stream.write(text if text.endswith("\n") else text + "\n")
        stream.flush()
    except BrokenPipeError:
        silence(stream)
        return False
    return True


def silence(stream: TextIO) -> None:
    """Point a stream at the null device, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
