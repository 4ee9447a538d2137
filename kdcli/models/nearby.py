"""Local directories that a reference may have meant: a misspelt path looks like a name on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

_CUTOFF = 0.6  # of difflib's similarity; two letters swapped in a name of three give 0.67
_MOST = 1000  # directories of one place to look at


def like(path: Path) -> Path | None:
    """The directory whose path differs least from one that does not exist; None where none is near.

    Every part of the path is looked for as it is, then under the most similar name that there is.
    """
    place = Path(path.anchor) if path.anchor else Path()
    for part in path.relative_to(path.anchor).parts if path.anchor else path.parts:
        if part == ".." or (place / part).is_dir():
            place = place / part
            continue
        near = difflib.get_close_matches(part, _directories(place), n=1, cutoff=_CUTOFF)
        if not near:
            return None
        place = place / near[0]
    return None if place == path else place


def _directories(place: Path) -> list[str]:
    try:
        names = [entry.name for entry in place.iterdir() if entry.is_dir()]
    except OSError:
        return []
    return sorted(name for name in names if name.isprintable())[:_MOST]
