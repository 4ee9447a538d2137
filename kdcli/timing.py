"""Seconds a phase, for the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from kdcli import interrupts


class Timings:
    """Adds up wall-clock seconds by phase name; nested phases count in the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        interrupts.check()
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
            interrupts.check()
        finally:
            whole = time.perf_counter() - started
            own = whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def rounded(self) -> dict[str, float]:
        """Phase -> seconds, to the millisecond, in the order of first use."""
        return {name: round(value, 3) for name, value in self.seconds.items()}
