"""SIGINT, SIGTERM and SIGHUP, remembered, so that no except clause on the way can lose one.

The handler notes the signal, then raises :class:`InterruptedRun`, which is no ``Exception``: libraries that wrap or
swallow those let it pass. Some lose it all the same (C++ that makes an error of its own of what a callback raised, a
bare ``except``, a ``__del__``), so nothing relies on what was raised alone: :func:`check` raises again at the next safe
point, and whoever turns exceptions into an exit code asks :func:`caught` first.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kdcli.errors import InterruptedRun

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated (hung up)"}
_DEEPEST = 100  # exceptions of a chain that are looked at


@dataclass
class _Signals:
    number: int | None = None  # the first signal that arrived
    before: dict[int, Any] | None = None  # handlers that were there; None: ours are not installed
    held: int = 0
    stepping: int = 0


_state = _Signals()


def caught() -> int | None:
    """The signal that told this process to stop; None when there was none."""
    return _state.number


def stopped() -> InterruptedRun:
    """The exception of the signal that was caught, to be raised or explained."""
    number = signal.SIGINT if _state.number is None else _state.number
    return InterruptedRun(_WORDS[signal.Signals(number)], terminated=number != signal.SIGINT)


def check() -> None:
    """A safe point: end here if a signal arrived and what it raised got lost.

    Raises:
        InterruptedRun: It did. Never inside :func:`held` and :func:`stepping`.
    """
    if _state.number is not None and not _state.held and not _state.stepping:
        raise stopped()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Handle the signals inside the block; those that this process ignores (``nohup``) stay ignored.

    Only in the main thread, and only the outermost block does something: at its end the handlers that were there
    come back, and what was caught is forgotten.
    """
    if _state.before is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {
        int(n): old for n in SIGNALS if (old := signal.getsignal(n)) not in (signal.SIG_IGN, None)
    }
    _state.before, _state.number = before, None
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        _state.before, _state.number = None, None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """No signal raises inside the block, as short as two renames: :func:`check` behind it, where one may."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1


class Steps:
    """Of :func:`stepping`: says whether to stop after this step."""

    @property
    def signal(self) -> int | None:
        """The signal that arrived, or None."""
        return caught()


@contextlib.contextmanager
def stepping() -> Iterator[Steps]:
    """A loop that ends by itself after the step in which a signal arrived; only a second signal raises at once.

    Raises:
        InterruptedRun: A signal arrived, and the loop ended without looking again.
    """
    with installed():
        _state.stepping += 1
        try:
            yield Steps()
        finally:
            _state.stepping -= 1
        check()


def _handle(number: int, frame: FrameType | None) -> None:
    again = _state.number is not None
    if not again:
        _state.number = number
    if _state.held or _unwinding() or (_state.stepping and not again):
        return
    raise stopped()


def _unwinding() -> bool:
    """Whether the code that a signal met is already cleaning up after one: a second must not tear that apart."""
    error = sys.exception()
    for _ in range(_DEEPEST):
        if error is None or isinstance(error, InterruptedRun):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, InterruptedRun)
