"""Memory between the steps: what was freed goes back to the system, and what stays is not searched for garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator


def give_back() -> None:
    """Ask glibc to return what was freed: it keeps blocks of some megabytes. Others return them by themselves."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has neither this file nor the function
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Let no garbage be collected while libraries are imported.

    Torch and transformers make some 400,000 objects that all stay, and Python looks through them again and again:
    a seventh of the processor time of importing them.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
