"""Where kdcli keeps what can be made again: fine-tuned teachers, teacher outputs, exported inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def root() -> Path:
    """``$KDCLI_CACHE``, else ``$XDG_CACHE_HOME/kdcli``, else ``~/.cache/kdcli``; not created here."""
    if own := os.environ.get("KDCLI_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kdcli"


def key(**parts: Any) -> str:
    """A content key: sha256 of the parts as canonical JSON, shortened to 32 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def entry(kind: str, name: str) -> Path:
    """The place of one entry, whether it is there or not."""
    return root() / kind / name


@contextlib.contextmanager
def writing(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``final`` when the block ends well, and vanishes otherwise.

    Two processes may make the same entry at once: the content is the same, so the first one stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name[:12]}-", dir=final.parent))
    try:
        yield temporary
        try:
            os.replace(temporary, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
