"""Where the data of a report are: recorded so that another directory, another day or a moved project finds them.

A path that was typed relative is kept as typed, for people, and relative to the output directory, for the next stage:
so a project that moves as a whole keeps working, and a report tells nothing of the machine that was not typed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kdcli.data.sources import ALIASES, Dataset
from kdcli.errors import InputError
from kdcli.report.redact import redact
from kdcli.report.schema import DataInfo

ReferenceKind = Literal["path", "alias", "hub"]


@dataclass(frozen=True)
class Recorded:
    """Data that a model's own report names, found again."""

    ref: str  # as the report has it
    place: str  # as :func:`kdcli.data.sources.load` takes it
    fingerprint: str
    splits: frozenset[str]
    certain: bool  # False: an older report, which does not say where its paths begin


def kind_of(ref: str) -> ReferenceKind:
    """What a reference to data is; a local path wins, as in :func:`kdcli.data.sources.load`."""
    if os.path.exists(ref):
        return "path"
    return "alias" if ref in ALIASES else "hub"


def info(dataset: Dataset, place: str, out: Path | None) -> DataInfo:
    """What a report in ``out`` says of its data.

    Args:
        dataset: The data, under the name that was typed first.
        place: Where they were read this time, seen from here.
        out: None for a report that goes into no directory.
    """
    rows = {name: len(split) for name, split in dataset.splits.items()}
    kind = kind_of(place)
    relative = kind == "path" and not os.path.isabs(dataset.ref)
    path = _way(place, out) if relative and out is not None else None
    return DataInfo(ref=redact(dataset.ref), fingerprint=dataset.fingerprint, rows=rows, kind=kind, path=path)


def moved(data: DataInfo | None, place: str, out: Path) -> DataInfo | None:
    """The same for a copy of a report in ``out``."""
    if data is None or data.path is None:
        return data
    return data.model_copy(update={"path": _way(place, out)})


def _way(place: str, out: Path) -> str | None:
    try:
        return Path(os.path.relpath(os.path.abspath(place), os.path.abspath(out))).as_posix()
    except ValueError:  # another drive
        return None


def find(data: DataInfo, model: Path) -> Recorded:
    """Find the data that the report in ``model`` was made with.

    Raises:
        InputError: They are not where the report says, or it does not say where.
    """

    def found(place: str, certain: bool = True) -> Recorded:
        return Recorded(data.ref, place, data.fingerprint, frozenset(data.rows), certain)

    how = "give the data with --data"
    if data.kind == "path" and data.path is not None:
        # As the directories are written, and as they are behind links.
        starts = (os.path.abspath(model), os.path.realpath(model))
        places = [os.path.normpath(os.path.join(start, data.path)) for start in starts]
        for place in places:
            if os.path.exists(place):
                return found(_short(place))
        raise InputError(
            f"'{model}' was made with the data '{data.ref}', which is no longer at {_short(places[0])}", how
        )
    if os.path.isabs(data.ref):
        if not os.path.exists(data.ref):
            raise InputError(f"'{model}' was made with the data '{data.ref}', which is not there", how)
        return found(data.ref)
    here = os.path.exists(data.ref)
    if data.kind in ("alias", "hub") or (data.kind is None and data.ref in ALIASES and not here):
        if here:
            raise InputError(
                f"'{model}' was made with the data set '{data.ref}', but here is a file or directory of that name",
                f"{how}, or run kdcli in another directory",
            )
        return found(data.ref)
    if here and data.kind is None:
        return found(data.ref, certain=False)
    raise InputError(
        f"'{model}' was made with the data '{data.ref}', and its report does not say where that is", how
    )


def checked(dataset: Dataset, recorded: Recorded | None) -> Dataset:
    """Name the data as their report does, and say when they are not what it was made with.

    Raises:
        InputError: They are not, and only their name here spoke for them.
    """
    if recorded is None:
        return dataset
    named = replace(dataset, ref=recorded.ref)
    if dataset.fingerprint == recorded.fingerprint or set(dataset.splits) != recorded.splits:
        return named
    said = f"the rows at '{recorded.place}' are not those that the model was made with, or are split in another way"
    if not recorded.certain:
        raise InputError(
            f"{said}; its report names them '{recorded.ref}' and does not say where that is",
            "give the data with --data",
        )
    return replace(named, warnings=[*named.warnings, ("data-changed", said)])


def _short(place: str) -> str:
    """A path as seen from here, where that is shorter."""
    try:
        return min(os.path.relpath(place), place, key=len)
    except ValueError:  # another drive
        return place
