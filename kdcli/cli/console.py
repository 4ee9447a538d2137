"""Everything for people, on stderr: lines, progress and errors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from kdcli import interrupts
from kdcli.progress import Progress, ProgressTask
from kdcli.report.redact import redact

EVERY_SECONDS = 5.0
"""A line of progress this often where there is no terminal."""


def clean(text: str) -> str:
    """Make control characters visible, so that a name in a model file cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """``42s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Console(Progress):
    """Plain lines; see :class:`Bars` for terminals."""

    def __init__(self, prefix: str = "kdcli", *, quiet: bool = False, verbose: bool = False) -> None:
        self.prefix = prefix
        self.quiet = quiet
        self.verbose = verbose
        self.stream = sys.stderr  # kept: libraries are silenced by putting another one in its place
        self.terminal = _terminal()
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self._start = time.monotonic()
        self._phase: tuple[str, float] | None = None

    def elapsed(self) -> str:
        """How long ago this console was made."""
        return duration(time.monotonic() - self._start)

    def line(self, text: str = "") -> None:
        """One line, unless quiet."""
        if not self.quiet:
            self._write(text)

    def error(self, message: str, hint: str | None = None) -> None:
        """What went wrong, always shown."""
        self._write(f"{self.paint('31', self.prefix)}: {redact(message)}")
        if hint:
            self._write(f"  {redact(hint)}")

    def paint(self, code: str, text: str) -> str:
        """Colour a word where colours are wanted (31 red, 32 green, 33 yellow, 1 bold)."""
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def phase(self, title: str) -> None:
        """Name the new phase; with -v also how long the last one took. A safe point to stop at."""
        interrupts.check()
        now = time.monotonic()
        if self.verbose and self._phase is not None:
            self.line(f"  {self._phase[0]} took {duration(now - self._phase[1])}")
        self._phase = (title, now)
        self.line(f"{self.prefix}: {clean(title)}")

    def note(self, text: str) -> None:
        self.line(f"  {clean(redact(text))}")

    def warn(self, text: str) -> None:
        self.line(f"  {self.paint('33', 'warning')}: {clean(redact(text))}")

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[ProgressTask]:
        """A line every few seconds, none for a task that is done before."""
        task = _Lines(self, title, total)
        yield task
        task.end()

    def _write(self, text: str) -> None:
        # A closed stderr must not turn a finished stage into a failed one.
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self.stream, flush=True)


class _Lines(ProgressTask):
    """Plain progress with the time that is left."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console, self.title, self.total = console, title, total
        self.done, self.detail = 0, ""
        self.start = self.last = time.monotonic()
        self.printed = False

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Count; print when the last line is old. A safe point to stop at."""
        interrupts.check()
        self.done += steps
        self.detail = detail or self.detail
        now = time.monotonic()
        if now - self.last < EVERY_SECONDS or self.done >= self.total:
            return
        self.last, self.printed = now, True
        left = (now - self.start) / self.done * (self.total - self.done) if self.done else 0.0
        share = 100 * self.done / max(self.total, 1)
        parts = [
            f"  {self.title} {self.done}/{self.total}",
            f"{share:.0f}%",
            self.detail,
            f"ETA {duration(left)}",
        ]
        self.console.line(clean("  ".join(part for part in parts if part)))

    def end(self) -> None:
        """Close a task that was shown."""
        if self.printed:
            parts = [f"  {self.title} {self.done}/{self.total}", self.detail]
            took = duration(time.monotonic() - self.start)
            self.console.line(clean("  ".join(part for part in [*parts, f"took {took}"] if part)))


class Bars(Console):
    """For a terminal: bars of rich, which is imported with the first of them."""

    def __init__(self, prefix: str = "kdcli", *, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(prefix, quiet=quiet, verbose=verbose)
        self._bars: Any = None

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[ProgressTask]:
        """One bar; tasks inside a task share its display."""
        if self.quiet:
            yield ProgressTask()
            return
        outer = self._bars
        if outer is None:
            self._bars = _rich_progress(self)
            self._bars.start()
        number = self._bars.add_task(clean(title), total=total, detail="")
        try:
            yield _Bar(self._bars, number)
        finally:
            if outer is None:
                self._bars.stop()
                self._bars = None
            else:
                self._bars.remove_task(number)

    def _write(self, text: str) -> None:
        if self._bars is None:
            super()._write(text)
            return
        # Through rich, so that the line stands above the bar; as it is, without markup or wrapping.
        from rich.text import Text

        with contextlib.suppress(OSError, ValueError):
            self._bars.console.print(Text.from_ansi(text), soft_wrap=True)


class _Bar(ProgressTask):
    def __init__(self, bars: Any, number: Any) -> None:
        self.bars, self.number = bars, number

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Move the bar. A safe point to stop at."""
        interrupts.check()
        if detail:
            self.bars.update(self.number, detail=clean(detail))
        self.bars.advance(self.number, steps)


def _rich_progress(owner: Console) -> Any:
    from rich import progress
    from rich.console import Console as RichConsole

    return progress.Progress(
        progress.TextColumn("  {task.description}", markup=False),
        progress.BarColumn(bar_width=28),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[detail]}", markup=False),
        progress.TimeRemainingColumn(compact=True),
        console=RichConsole(file=owner.stream, no_color=not owner.colour, highlight=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def make(prefix: str, *, quiet: bool = False, verbose: bool = False) -> Console:
    """The console that suits stderr."""
    return (Bars if _terminal() else Console)(prefix, quiet=quiet, verbose=verbose)
