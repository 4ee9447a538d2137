"""A folder into the files of its splits: named by hand, cloned from a hub, or written by ``save_to_disk``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kdcli.data.files import FORMS, REFUSED, form_of, stem_of
from kdcli.errors import InputError
from kdcli.names import printable

SPLITS: Mapping[str, str] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What a split is called -> what it is here."""

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(?:-[0-9a-f]{8,40})?")


@dataclass(frozen=True)
class FolderLayout:
    """The files of each split; several for one split are its parts in order."""

    files: dict[str, list[Path]]
    #: Whether it is somebody's published data set: its splits are not the user's to change.
    published: bool = False
    notes: list[str] = field(default_factory=list)


def layout(path: Path) -> FolderLayout:
    """Find the files of the splits: in the folder, in its ``data`` folder, or in the one folder that has them.

    Raises:
        InputError: Two files for one split, a part of a split that is missing, or several folders to choose
            from.
    """
    for place in (path, path / "data"):
        if files := _splits_in(place):
            sharded = any(_SHARD.fullmatch(stem_of(f)) for group in files.values() for f in group)
            return FolderLayout(files, sharded or place != path, _left_out(place, files))
    roots = [root for root in (path, path / "data") if root.is_dir()]
    inner = [sub for root in roots for sub in sorted(root.iterdir()) if sub.is_dir() and sub.name[:1] != "."]
    found = {sub: files for sub in inner if (files := _splits_in(sub))}
    if len(found) > 1:
        names = ", ".join(printable(str(sub.relative_to(path))) for sub in found)
        raise InputError(
            f"data directory '{path}' has several data sets: {names}", f"give one: {next(iter(found))}"
        )
    for place, files in found.items():
        return FolderLayout(files, True, _left_out(place, files))
    return FolderLayout({})


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        return {}
    entries = sorted(folder.iterdir())
    readable = [p for p in entries if form_of(p)[0] in FORMS and not p.is_dir()]
    found = _by_split(folder, readable)
    # A packed twin, such as train.csv.zip beside train.csv, is of no interest where there is the file.
    refused = [p for p in entries if form_of(p)[0] in REFUSED and not p.is_dir()]
    for split, group in _by_split(folder, refused).items():
        found.setdefault(split, group)
    if found:
        return found
    inner: dict[str, list[Path]] = {}
    for sub in entries:
        if sub.name.lower() not in SPLITS or not sub.is_dir():
            continue
        split = SPLITS[sub.name.lower()]
        group = [p for p in sorted(sub.iterdir()) if form_of(p)[0] in FORMS and p.is_file()]
        if group and split in inner:
            raise _twice(folder, split, inner[split][0].parent, sub)
        if group:
            inner[split] = group
    return inner


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    for file in files:
        stem = stem_of(file)
        shard = _SHARD.fullmatch(stem)
        if (stem if shard is None else shard.group(1)) in SPLITS:
            named.setdefault(stem if shard is None else shard.group(1), []).append(file)
    found: dict[str, list[Path]] = {}
    for name, group in named.items():
        split = SPLITS[name]
        if split in found:
            raise _twice(folder, split, found[split][0], group[0])
        found[split] = _parts(folder, split, group)
    return {split: found[split] for split in dict.fromkeys(SPLITS.values()) if split in found}


def _parts(folder: Path, split: str, group: list[Path]) -> list[Path]:
    """The files of one split: one file, or all parts of one count."""
    shards = [_SHARD.fullmatch(stem_of(file)) for file in group]
    if len(group) == 1 and shards[0] is None:
        return group
    counts = {(m.group(3), form_of(f)) if m else None for m, f in zip(shards, group, strict=True)}
    numbers = [int(m.group(2)) for m in shards if m]
    if len(counts) > 1 or None in counts or len(set(numbers)) < len(numbers):
        raise _twice(folder, split, group[0], group[1])
    total = int(shards[0].group(3)) if shards[0] else 0
    if missing := sorted(set(range(total)) - set(numbers)):
        raise InputError(
            f"'{folder}': of the {total} files of the {split} split, number {missing[0]:05} is missing",
            "fetch the data set again",
        )
    return group


def _twice(folder: Path, split: str, first: Path, second: Path) -> InputError:
    return InputError(
        f"'{folder}' has two files for the {split} split: {printable(first.name)} and {printable(second.name)}",
        "keep one of them",
    )


def _left_out(folder: Path, files: Mapping[str, list[Path]]) -> list[str]:
    """Say which files look like splits and are none, such as dev_matched.tsv."""
    used = {file for group in files.values() for file in group}
    other = [
        printable(p.name)
        for p in sorted(folder.iterdir())
        if p.is_file()
        and p not in used
        and form_of(p)[0] in FORMS
        and re.match(rf"({'|'.join(SPLITS)})[-_.]", stem_of(p))
    ]
    return [f"'{folder}': left out: {', '.join(other[:8])}"] if other else []
