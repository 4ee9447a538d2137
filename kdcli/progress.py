"""How library code tells a person what it is doing, without knowing about terminals.

``kdcli.cli.console`` subclasses :class:`Progress`; the base class is silent, so that every stage
can be called from Python or from a test without output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """A silent observer; every method may be overridden, and none may raise but for a signal that arrived."""

    def phase(self, title: str) -> None:
        """A new part of the stage's life begins (``measure before``, ``export`` ...)."""

    def note(self, text: str) -> None:
        """A fact worth a line: a choice made, a cache used, a fallback taken."""

    def warn(self, text: str) -> None:
        """Something the user should know before trusting the result."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[ProgressTask]:
        """Count ``total`` steps of one long piece of work."""
        yield ProgressTask()


class ProgressTask:
    """One counted piece of work; see :meth:`Progress.task`."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """``steps`` more are done; ``detail`` is a short live reading such as ``loss 0.31``."""
