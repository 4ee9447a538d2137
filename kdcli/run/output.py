"""The output directory: reserved early, built beside its place, published in one rename.

Two runs may start at once. A reservation is a lock on a file beside the place, which the system drops with the process
that holds it, so that nobody has to tell a dead run from a living one; a file system without locks has none. Publishing
does not rely on it: a directory that holds something is only ever replaced with ``force``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from kdcli import atomic, cache, interrupts
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
        return next(p for p in _defaults(model_name, stage) if not p.exists())
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
    if os.path.ismount(out):
        hint = f"give a directory in it: -o {out / 'model'}"
        raise UsageError(f"output '{out}' is a mount point, which nothing can be renamed to", hint)
    if not any(out.iterdir()):
        return out
    if not force:
        raise UsageError(f"output '{out}' exists already", "give another -o, or --force to replace it")
    if place in (Path.cwd(), cache.home(), Path(place.anchor)) or not (out / "report.json").is_file():
        raise UsageError(f"--force replaces only a directory that kdcli wrote; '{out}' holds no report.json")
    return out


def _defaults(model_name: str, stage: str) -> Iterator[Path]:
    """Names for an output that has none, the best one first."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name).strip("-.") or "model"
    return _numbered(DEFAULT_PARENT / f"{stem}-{stage}")


def _numbered(path: Path) -> Iterator[Path]:
    """``path``, ``path-2``, ``path-3`` ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


@contextlib.contextmanager
def reserved(
    out: Path | None, model_name: str, stage: str, *, force: bool, inputs: tuple[Path, ...]
) -> Iterator[Path]:
    """:func:`choose` a place that no other run writes to, and keep others off it inside the block.

    Raises:
        UsageError: As :func:`choose`, or another run writes there.
        ResourceError: The place cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if out is None:
            for path in _defaults(model_name, stage):
                # Looked at again with the lock: its last holder may have published in between.
                if not path.exists() and _lock(path, stack) is None and not path.exists():
                    break
        else:
            path = choose(out, model_name, stage, force=force, inputs=inputs)
            if (holder := _lock(path, stack)) is not None:
                raise UsageError(
                    f"another run of kdcli{holder} writes to '{out}'", "wait for it, or give another -o"
                )
            choose(out, model_name, stage, force=force, inputs=inputs)
        yield path


def _lock(path: Path, stack: contextlib.ExitStack) -> str | None:
    """Lock a place until the stack ends; what is known of the process that has it locked, or None."""
    made = not path.parent.exists()
    file = path.parent / f".{path.name}.lock"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            if not path.parent.exists():
                continue  # another run has just tidied it up
            raise
        except OSError as error:
            raise ResourceError(f"cannot write to '{path.parent}': {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            number = os.read(descriptor, 20).decode("ascii", "replace").strip() if held else ""
            os.close(descriptor)
            if not held:  # no locks here
                return None
            return f" (process {number})" if number.isdigit() else ""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)  # its last holder removed it while this one waited at the door

    def release() -> None:
        with interrupts.held(), contextlib.suppress(OSError):
            file.unlink()
            if made:
                path.parent.rmdir()  # only if nothing came of it
        os.close(descriptor)

    stack.callback(release)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return None


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


def publish(work: Path, out: Path, *, force: bool = False, named: bool = True) -> Path:
    """Sync every file and rename ``work`` to its place; nothing that holds something is replaced without ``force``.

    Args:
        work: From :func:`building`.
        out: The place.
        force: Replace a directory that kdcli wrote.
        named: The user named ``out``; otherwise the next free number is as good.

    Returns:
        Where it is.

    Raises:
        UsageError: The place was taken in the meantime; the message says where the result is kept instead.
    """
    for path in sorted(work.rglob("*")):
        if path.is_file():
            atomic.sync(path)
    interrupts.check()
    with interrupts.held():  # no signal may come between two renames
        if force and (out / "report.json").is_file() and not out.is_symlink():
            old = out.parent / f".{out.name}.old-{os.getpid()}"
            atomic.replace_directory(work, out, old)
            place = out
        else:
            place = next(path for path in _numbered(out) if _moved(work, path))
        atomic.sync(out.parent)
    if named and place != out:
        raise UsageError(
            f"output '{out}' was made by another process in the meantime and is left as it is",
            f"the result of this run is kept in '{place}'",
        )
    return place


def _moved(work: Path, place: Path) -> bool:
    """Rename a directory to a place that does not exist or is an empty directory; False where it is taken."""
    try:
        os.rename(work, place)  # of a directory: never replaces a file or what has something in it
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


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
