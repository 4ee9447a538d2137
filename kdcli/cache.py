"""Where kdcli keeps what can be made again: fine-tuned teachers, teacher outputs, exported inputs.

Entries are written beside their place and renamed, so that two runs may make the same one at once and nobody reads a
half of it; and they carry a digest of their content, so that one that was damaged later is made again instead of read.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import atomic, interrupts
from kdcli.errors import ResourceError

if TYPE_CHECKING:
    import numpy as np

SUMS = ".digests.json"  # of a directory
_MODE = 0o600  # of a file: what is made of somebody's texts is theirs
_MARK = b"\nkdcli-blake2b\n"  # ends an array's file, before the digest of all in front of it
_TAIL = len(_MARK) + hashlib.blake2b().digest_size


def root() -> Path:
    """``$KDCLI_CACHE``, else ``$XDG_CACHE_HOME/kdcli``, else ``~/.cache/kdcli``; not created here."""
    if own := os.environ.get("KDCLI_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kdcli"
    return home() / ".cache" / "kdcli"


def home() -> Path:
    """The user's home; one that is not there for a user who has none (a container with a number for a user)."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def variable() -> str:
    """What :func:`root` follows from: the name of an environment variable."""
    return next((n for n in ("KDCLI_CACHE", "XDG_CACHE_HOME") if os.environ.get(n)), "HOME")


def problem() -> str | None:
    """Why nothing can be written below :func:`root`, in words; None when it can."""
    place = root()
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"the cache '{place}' (from {variable()}) cannot be written: {error.strerror or error}"
    return None


@contextlib.contextmanager
def writable() -> Iterator[str | None]:
    """Make sure that there is a cache inside the block.

    Yields:
        None, or in words why a temporary one is used that goes with the block.

    Raises:
        ResourceError: ``KDCLI_CACHE`` names one that cannot be written, or there is no room for a temporary one.
    """
    reason = problem()
    if reason is None:
        yield None
        return
    if variable() == "KDCLI_CACHE":
        raise ResourceError(reason, "set KDCLI_CACHE to a directory that can be written")
    try:
        temporary = tempfile.mkdtemp(prefix="kdcli-cache-")
    except OSError as error:
        hint = "set KDCLI_CACHE to a directory that can be written, and TMPDIR to another"
        raise ResourceError(
            f"{reason}; neither can a temporary one: {error.strerror or error}", hint
        ) from error
    os.environ["KDCLI_CACHE"] = temporary
    try:
        yield f"{reason}; a temporary one is used. KDCLI_CACHE names a lasting one"
    finally:
        del os.environ["KDCLI_CACHE"]
        shutil.rmtree(temporary, ignore_errors=True)


def key(**parts: Any) -> str:
    """A content key: sha256 of the parts as canonical JSON, shortened to 32 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


@functools.cache
def code() -> str:
    """A digest of kdcli's own source: for entries that any change of it may change, and that are quickly made again."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def entry(kind: str, name: str) -> Path:
    """The place of one entry, whether it is there or not."""
    return root() / kind / name


@contextlib.contextmanager
def writing(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``final`` when the block ends well, and vanishes otherwise.

    Two processes may make the same entry at once: the content is the same, so the first one stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = atomic.beside(final)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        interrupts.check()
        sums = {name: _digest(temporary / name) for name in _names(temporary)}
        (temporary / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True), encoding="utf-8")
        for name in (*sums, SUMS):
            atomic.sync(temporary / name)
        try:
            os.replace(temporary, final)
        except OSError:
            if not intact(final):  # that removes a damaged one
                os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def intact(place: Path) -> bool:
    """Whether a directory entry is there and is what :func:`writing` made; what is not is removed."""
    if not place.exists():
        return False
    try:
        sums = json.loads((place / SUMS).read_text(encoding="utf-8"))
        good = sums == {name: _digest(place / name) for name in _names(place)}
    except (OSError, ValueError):
        good = False
    if not good:
        _remove(place)
    return good


def save_json(final: Path, content: Any) -> None:
    """Store what JSON can hold."""
    with atomic.replacing(final, _MODE) as temporary:
        text = json.dumps({"content": content, "digest": key(content=content)}, indent=1)
        temporary.write_text(text, encoding="utf-8")


def load_json(path: Path) -> Any:
    """What :func:`save_json` stored; None where nothing is, or something damaged, which is removed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["digest"] == key(content=stored["content"]):
            return stored["content"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    _remove(path)
    return None


def save_array(final: Path, array: np.ndarray) -> None:
    """Store an array that is in memory."""
    with filling(final, array.dtype, array.shape) as places:
        places[...] = array


@contextlib.contextmanager
def filling(final: Path, dtype: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield a memory-mapped array to be filled, stored as ``final`` when the block ends well.

    Raises:
        OSError: The disk has no room for it (``ENOSPC``); found before the first page is written, because a
            mapped page without room would end the process.
    """
    import numpy as np

    with atomic.replacing(final, _MODE) as temporary:
        places: Any = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                os.posix_fallocate(descriptor, 0, temporary.stat().st_size + _TAIL)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            finally:
                os.close(descriptor)
            os.truncate(temporary, places.offset + places.nbytes)
        yield places
        places.flush()
        del places
        digest = _digest(temporary)
        with temporary.open("ab") as stream:
            stream.write(_MARK + bytes.fromhex(digest))


def load_array(
    path: Path, *, shape: tuple[int, ...] | None = None, mapped: bool = False
) -> np.ndarray | None:
    """A stored array; None where nothing is, or something damaged, which is removed.

    Args:
        path: Of :func:`save_array` or :func:`filling`.
        shape: That it must have; any if None.
        mapped: Leave it on the disk.
    """
    import numpy as np

    if not path.is_file():
        return None
    try:
        size = path.stat().st_size - _TAIL
        with path.open("rb") as stream:
            digest = _digest_of(stream, size)
            good = stream.read() == _MARK + bytes.fromhex(digest)
        if good:
            found: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
            if shape is None or found.shape == shape:
                return found
    except FileNotFoundError:
        return None  # another run has just removed it
    except (OSError, ValueError, EOFError):
        pass
    _remove(path)
    return None


def _names(folder: Path) -> list[str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)
    return sorted(p.relative_to(folder).as_posix() for p in files)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return _digest_of(stream, path.stat().st_size)


def _digest_of(stream: Any, size: int) -> str:
    """blake2b of the next ``size`` bytes, as hex."""
    digest = hashlib.blake2b()
    while size > 0 and (part := stream.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
