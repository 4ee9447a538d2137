"""What a process has freed goes back to the system before the next step, which would otherwise come on top of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def give_back() -> None:
    """Ask glibc to return what was freed: it keeps blocks of some megabytes. Others return them by themselves."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has neither this file nor the function
            ctypes.CDLL("libc.so.6").malloc_trim(0)
