"""Names from files, for people: safe for a terminal, and not too many of them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 12  # of a long list


def printable(name: str, width: int = 60) -> str:
    """A name from a file, safe for a terminal: no control characters, at most ``width`` characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[: width + 1])
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def listed(names: Sequence[str]) -> str:
    """The names for a message, a long list shortened."""
    if not names:
        return "none"
    rest = len(names) - SHOWN
    return ", ".join(map(printable, names[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")
