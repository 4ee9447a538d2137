"""The output directory: chosen early, built beside its place, published in one rename."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kdcli.errors import ResourceError, UsageError

DEFAULT_PARENT = Path("kdcli-out")


def choose(out: Path | None, model_name: str, stage: str, *, force: bool, inputs: tuple[Path, ...]) -> Path:
    """Return the output directory, which does not exist yet or may be replaced.

    Args:
        out: As given by the user; None makes ``kdcli-out/<model>-<stage>``, numbered when taken.
        model_name: For the default name.
        stage: For the default name.
        force: Allow replacing a directory that kdcli wrote.
        inputs: Directories that must survive.

    Raises:
        UsageError: The place is taken, or replacing it would destroy something else.
    """
    if out is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name).strip("-.") or "model"
        names = (f"{stem}-{stage}" + (f"-{n}" if n > 1 else "") for n in range(1, 10_000))
        return next(p for name in names if not (p := DEFAULT_PARENT / name).exists())
    if out.is_symlink():
        raise UsageError(f"output '{out}' is a symbolic link", "give a plain directory")
    place = out.resolve()
    for source in (p.resolve() for p in inputs):
        if place == source or place in source.parents or source in place.parents:
            raise UsageError(
                f"output '{out}' and input '{source.name}' contain each other",
                "write to a directory of its own",
            )
    if not out.exists():
        return out
    if out.is_file():
        raise UsageError(f"output '{out}' is a file", "give a directory")
    if not any(out.iterdir()):
        return out
    if not force:
        raise UsageError(f"output '{out}' exists already", "give another -o, or --force to replace it")
    if place in (Path.cwd(), Path.home(), Path(place.anchor)) or not (out / "report.json").is_file():
        raise UsageError(f"--force replaces only a directory that kdcli wrote; '{out}' holds no report.json")
    return out


def resume_directory(out: Path) -> Path:
    """Where resume points of a run with this output go."""
    return out.parent / f".{out.name}.resume"


@contextlib.contextmanager
def building(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a sibling temporary directory; it vanishes with the block unless :func:`publish` moved it.

    Raises:
        ResourceError: The disk has less than ``needed_bytes`` left, or the place cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        work = out.parent / f".{out.name}.tmp-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise ResourceError(
                f"'{out.parent}' has {free >> 20} MiB of disk left, about {needed_bytes >> 20} MiB are needed"
            )
        work.mkdir()
    except OSError as error:
        raise ResourceError(f"cannot write to '{out.parent}': {error.strerror or error}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, out: Path) -> None:
    """Sync every file and rename ``work`` to ``out``, replacing what :func:`choose` allowed."""
    for path in sorted(work.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    if out.exists():
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        os.replace(out, old)
        os.replace(work, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, out)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    """Remove what a killed run of the same output left behind."""
    for left in out.parent.glob(f".{out.name}.tmp-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
