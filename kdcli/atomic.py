"""Files that take their name once they are complete, so that nobody reads a half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from kdcli import interrupts


@contextlib.contextmanager
def replacing(final: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of an empty temporary file that becomes ``final`` when the block ends well, else vanishes.

    It is beside ``final``, whose directory is made where it is missing, and on the disk before it takes the name.

    Args:
        final: What it replaces, if there is such a file.
        mode: Of the new file, less what the process's umask takes away.

    Raises:
        OSError: It cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(final)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, mode))
    try:
        yield temporary
        interrupts.check()
        sync(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def beside(final: Path) -> Path:
    """A name in the directory of ``final`` that nobody else has."""
    return final.with_name(f".{final.name[:12]}-{secrets.token_hex(6)}")


def replace_directory(new: Path, place: Path, aside: Path) -> None:
    """Put a directory where another one may be; a crash in between leaves that one ``aside``."""
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        os.replace(place, aside)
    os.replace(new, place)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
