"""Which column is the text and which the label, and what to offer when a file calls them otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from kdcli.data.labels import suggest
from kdcli.data.tables import Table
from kdcli.errors import InputError, UsageError, did_you_mean
from kdcli.names import listed, printable
from kdcli.tasks.task import Kind

_TEXT_ROLES = ("text", "text_a", "text_b")
ROLES = (*_TEXT_ROLES, "label", "labels", "query")
SEPARATORS = (";", "|", ",")
"""What may stand between several labels in one cell."""
_IDS = ":ids"
_SEP = ":sep="
_PART = re.compile(rf"(?<!{_SEP}),")  # a comma ends a part, but for the one that is the separator itself
_LOOKED_AT = 1000  # rows of a column that tell what it holds, for a message
_WORDS_OF_A_NAME = 5  # a column with a longer name is more likely a text, for a message

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("sentence_1", "sentence_2"),
    ("text_1", "text_2"),
    ("s1", "s2"),
)
_TEXTS = (
    *("sentence", "review", "content", "body", "comment", "comment_text", "tweet", "message", "utterance"),
    *("review_text", "reviewtext", "review_body", "sms", "headline", "description", "document", "abstract"),
    *("article", "post", "news", "input", "inputs", "question", "query", "title", "sentences", "texts"),
)
_LABELS = (
    *("labels", "target", "class", "category", "sentiment", "intent", "topic", "emotion", "gold_label"),
    *("label_text", "label_name", "polarity", "y", "output", "tag", "is_duplicate", "coarse_label"),
    *("airline_sentiment", "rating", "stars", "score", "relevance", "similarity", "similarity_score"),
)


@dataclass(frozen=True)
class Columns:
    """What ``--columns`` says: names of columns by role, and how the labels are written."""

    names: dict[str, str] = field(default_factory=dict)
    ids: bool = False  # the labels are ids of the model
    separator: str | None = None  # between the labels of a cell

    def name(self, role: str) -> str:
        """The column that plays a role; the role's own name where none was given."""
        return self.names.get(role, role)

    def with_ids(self, role: str = "label", name: str | None = None) -> str:
        """The same as a value of ``--columns``, with numbers taken as the model's ids.

        Args:
            role: ``label``, or ``labels`` where a row has several.
            name: The column, where it is not what :meth:`name` says.
        """
        chosen = {k: v for k, v in self.names.items() if k not in ("label", "labels")}
        chosen[role] = (name or self.name(role)) + _IDS
        if self.separator is not None:
            chosen[role] += _SEP + self.separator
        return ",".join(f"{role}={name}" for role, name in chosen.items())


def parse_columns(given: str | None) -> Columns:
    """Parse ``text=sentence,label=intent`` and what may follow the name of a label column.

    ``label=intent:ids`` and ``labels=tags:ids`` say that the numbers are the model's ids, ``labels=tags:sep=;`` what
    stands between the labels of a cell, and ``labels=anger+joy`` or ``labels=emotion_*`` that each column is one label.

    Raises:
        UsageError: Not of that form, an unknown role, a role given twice, half a pair, or an unknown separator.
    """
    chosen: dict[str, str] = {}
    found = Columns(chosen)
    for part in _PART.split(given) if given is not None else ():
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if role in ("label", "labels"):
            name, found = _suffixes(role, name, found)
        if not (role and equals and name):
            raise UsageError(
                f"'{printable(part)}' in --columns is not ROLE=NAME",
                "for example --columns text=sentence,label=intent",
            )
        if role not in ROLES:
            raise UsageError(
                f"--columns names an unknown role '{printable(role)}': {did_you_mean(role, ROLES)}"
            )
        if role in chosen:
            raise UsageError(f"--columns gives '{role}' twice")
        chosen[role] = name
    if ("text_a" in chosen) != ("text_b" in chosen) or {"text", "text_a"} <= set(chosen):
        raise UsageError("--columns takes either text=NAME, or both text_a=NAME and text_b=NAME")
    if {"label", "labels"} <= set(chosen):
        raise UsageError("--columns takes either label=NAME, or labels=NAME where a row has several labels")
    return found


def _suffixes(role: str, name: str, found: Columns) -> tuple[str, Columns]:
    """The name without ``:ids`` and ``:sep=X`` behind it, and what they say; in any order."""
    while True:
        if name.endswith(_IDS):
            name, found = name.removesuffix(_IDS).strip(), replace(found, ids=True)
        elif role == "labels" and _SEP in name:
            name, _, separator = name.rpartition(_SEP)
            if separator not in SEPARATORS:
                raise UsageError(
                    f"'{printable(separator)}' can't separate labels: choose one of {' '.join(SEPARATORS)}",
                    "for example --columns 'labels=tags:sep=;'",
                )
            name, found = name.strip(), replace(found, separator=separator)
        else:
            return name, found


def settled(table: Table, columns: Columns, kind: Kind) -> Columns:
    """The same with the columns of a query and of what it is to rank as the pair of texts, where no pair is named.

    Only numbers rank. Queries that are whole numbers tell which rows belong together, and are no texts.
    """
    name = query_of(table.names, columns)
    text = None if name is None else _ranked(table.names, columns)
    if kind != "number" or name is None or text is None or name == text:
        return columns
    others = {role: column for role, column in columns.names.items() if role != "text"}
    if all(re.fullmatch(r"[0-9]+", str(value).strip()) for value in table.column(name)):
        return replace(columns, names=others | {"text": text})
    return replace(columns, names=others | {"text_a": name, "text_b": text})


def query_of(names: Sequence[str], columns: Columns) -> str | None:
    """The column of queries."""
    return find(names, columns.name("query"))


def ranks(table: Table, columns: Columns) -> bool:
    """Whether the column of queries is there to rank the texts beside it: some of its values stand in several rows.

    A ``query`` without another text is a text itself, and one that never changes, as in collections of posts that were
    searched for, says nothing of the rows.
    """
    name = query_of(table.names, columns)
    if name is None:
        return False
    pair = text_roles(table.names, columns) == ("text_a", "text_b")
    if not pair and _ranked(table.names, columns) in (None, name):
        return False
    values = [str(value).strip() for value in table.column(name)]
    return 1 < len(set(values)) < len(values)


def _ranked(names: Sequence[str], columns: Columns) -> str | None:
    """The column of texts that a query ranks; None where the file has a pair of its own."""
    if find(names, columns.name("text_a")) is not None or "text_a" in columns.names:
        return None
    known = (columns.name("text"),) if "text" in columns.names else ("text", "passage", "document")
    return next((name for one in known if (name := find(names, one)) is not None), None)


def targets(names: Sequence[str], columns: Columns, kind: Kind) -> list[str]:
    """The columns that hold the answers of a kind: one, or one a label; none where the file has none.

    Raises:
        InputError: ``--columns labels=`` names columns that are not there.
    """
    if kind == "any-of" and "labels" in columns.names:
        wanted = columns.names["labels"]
        found = find(names, wanted)
        return [found] if found is not None else _each_a_label(names, columns, wanted)
    known = {"one-of": ["label"], "any-of": ["labels", "label"], "number": ["label", "score"]}[kind]
    if "label" in columns.names:
        known = [columns.names["label"]]
    return [name for one in known if (name := find(names, one)) is not None][:1]


def is_flags(names: Sequence[str], columns: Columns) -> bool:
    """Whether ``--columns`` names one column a label."""
    wanted = columns.names.get("labels", "")
    return find(names, wanted) is None and any(mark in wanted for mark in "+*?")


def _each_a_label(names: Sequence[str], columns: Columns, wanted: str) -> list[str]:
    """The columns of ``a+b`` or ``prefix_*``; none where it is neither."""
    if not any(mark in wanted for mark in "+*?"):
        return []
    taken = {find(names, columns.name(role)) for role in ROLES}
    found: list[str] = []
    for part in (piece.strip() for piece in wanted.split("+")):
        if "*" in part or "?" in part:
            here = [name for name in dict.fromkeys(names) if name not in taken and fnmatchcase(name, part)]
        else:
            here = [name for name in [find(names, part)] if name is not None]
        if not here:
            raise InputError(
                f"--columns labels={printable(wanted)}: no column is '{printable(part)}'",
                suggest(part, names),
            )
        found += here
    if again := [name for name in found if found.count(name) > 1]:
        raise InputError(f"--columns labels={printable(wanted)} names '{printable(again[0])}' twice")
    return found


def text_roles(names: Sequence[str], columns: Columns) -> tuple[str, ...]:
    """``text``, or ``text_a`` and ``text_b``: what was asked for, else what the file has."""
    if "text_a" in columns.names:
        return ("text_a", "text_b")
    pair = "text" not in columns.names and find(names, "text") is None and find(names, "text_a") is not None
    return ("text_a", "text_b") if pair else ("text",)


def find(names: Sequence[str], name: str) -> str | None:
    """The column of this name; one that differs in case alone where there is no other."""
    if name in names:
        return name
    alike = [other for other in names if other.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def complete(names: Sequence[str], columns: Columns, *, labelled: bool) -> bool:
    """Whether these are the columns of a file with everything that is needed."""
    texts = all(find(names, columns.name(role)) is not None for role in text_roles(names, columns))
    if not texts and (query_of(names, columns) is None or _ranked(names, columns) is None):
        return False
    if not labelled:
        return True
    try:
        return any(targets(names, columns, kind) for kind in ("one-of", "any-of", "number"))
    except InputError:
        return False


def named(table: Table, role: str, columns: Columns) -> str:
    """The column that has this role.

    Raises:
        InputError: There is none, or more than one; offers what the file seems to have.
    """
    wanted = columns.name(role)
    name = find(table.names, wanted)
    if name is None:
        if role in ("label", "labels") and len(several := _flags(table, columns)) > 1:
            raise InputError(
                f"'{table.source}' has no column '{printable(wanted)}', but columns of 0 and 1: {listed(several)}",
                f"if each is a label that a row may have: --columns {_labels_option(several)}",
            )
        if any(len(one.split()) > _WORDS_OF_A_NAME for one in table.names):
            raise InputError(
                f"'{table.source}' has no column '{printable(wanted)}': its first line seems to be a row, not the "
                f"names of the columns: {listed(table.names)}",
                "write the names into the first line, for example text,label",
            )
        offer = _offer(table, columns)
        if offer is not None and offer.rpartition(",")[2].casefold() == "label=labels":
            offer += "; or labels= for label=, where a row can have several"
        raise InputError(
            f"'{table.source}' has no column '{printable(wanted)}': {suggest(wanted, table.names)}",
            f"if these are the right ones: --columns {offer}"
            if offer
            else "name the columns with --columns text=NAME,label=NAME (or text_a=NAME,text_b=NAME,label=NAME)",
        )
    if (count := table.names.count(name)) > 1:
        raise InputError(f"'{table.source}' has {count} columns named '{printable(name)}'")
    return name


def _offer(table: Table, columns: Columns) -> str | None:
    """A value for ``--columns`` that fits the names of this table; None where they say too little."""
    left = [name for name in table.names if name and name.isprintable() and not set(name) & set(",=")]
    folded = {name.casefold(): name for name in left}
    chosen = {role: name for role, name in columns.names.items() if find(left, name) is not None}

    def first(known: Iterable[str]) -> str | None:
        return next((folded[name] for name in known if name in folded), None)

    if not chosen.keys() & {"text", "text_a"} and find(left, "text") is None:
        pair = next(((folded[a], folded[b]) for a, b in _PAIRS if a in folded and b in folded), None)
        if pair is not None:
            chosen |= dict(zip(("text_a", "text_b"), pair, strict=True))
        elif find(left, "text_a") is None:
            text = first(_TEXTS) or _only_prose(table, left)
            if text is None:
                return None
            chosen["text"] = text
    if not chosen.keys() & {"label", "labels"} and find(left, "label") is None:
        taken = {find(left, chosen.get(role, role)) for role in (*_TEXT_ROLES, "query")}
        rest = [name for name in left if name not in taken]
        label = first(name for name in _LABELS if folded.get(name) in rest)
        label = label or (rest[0] if len(rest) == 1 else None)
        if label is not None:
            chosen["label"] = label
    return ",".join(f"{role}={chosen[role]}" for role in ROLES if role in chosen) or None


def _only_prose(table: Table, names: Sequence[str]) -> str | None:
    """The one column whose values are mostly of several words."""

    def prose(values: list[Any]) -> bool:
        return sum(isinstance(v, str) and v.strip().count(" ") > 1 for v in values) * 2 > len(values)

    found = [name for name in names if prose(table.column(name)[:_LOOKED_AT])]
    return found[0] if len(found) == 1 else None


def _flags(table: Table, columns: Columns) -> list[str]:
    """Columns of 0 and 1 alone, which are one label each."""
    taken = {columns.name(role) for role in ROLES}
    return [
        name
        for name in dict.fromkeys(table.names)
        if name not in taken and _are_flags(table.column(name)[:_LOOKED_AT])
    ]


def _are_flags(values: list[Any]) -> bool:
    # A rare label may be 0 in every row; nothing but 1 is more likely a weight.
    return {str(value) for value in values} in ({"0", "1"}, {"0"}, {"0.0", "1.0"}, {"True", "False"})


def _labels_option(names: Sequence[str]) -> str:
    said = "labels=" + "+".join(names)
    return f"'{said}'" if re.search(r"[^\w+=.-]", said) else said
