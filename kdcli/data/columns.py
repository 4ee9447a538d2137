"""Which column is the text and which the label, and what to offer when a file calls them otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcli.data.labels import suggest
from kdcli.data.tables import Table
from kdcli.errors import InputError, UsageError, did_you_mean
from kdcli.names import listed, printable

ROLES = ("text", "text_a", "text_b", "label")
_IDS = ":ids"
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
    *("airline_sentiment", "rating", "stars", "score"),
)


@dataclass(frozen=True)
class Columns:
    """What ``--columns`` says: names of columns by role, and whether the label holds ids of the model."""

    names: dict[str, str] = field(default_factory=dict)
    ids: bool = False

    def name(self, role: str) -> str:
        """The column that plays a role; the role's own name where none was given."""
        return self.names.get(role, role)

    def with_ids(self) -> str:
        """The same as a value of ``--columns``, with numbers taken as the model's ids."""
        chosen = {**{k: v for k, v in self.names.items() if k != "label"}, "label": self.name("label") + _IDS}
        return ",".join(f"{role}={name}" for role, name in chosen.items())


def parse_columns(given: str | None) -> Columns:
    """Parse ``text=sentence,label=intent``; ``label=intent:ids`` says that the numbers are the model's ids.

    Raises:
        UsageError: Not of that form, an unknown role, a role given twice, or half a pair.
    """
    chosen: dict[str, str] = {}
    ids = False
    for part in given.split(",") if given is not None else ():
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if role == "label" and name.endswith(_IDS):
            name, ids = name.removesuffix(_IDS).strip(), True
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
    return Columns(chosen, ids)


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
    needed = (*text_roles(names, columns), *(("label",) if labelled else ()))
    return all(find(names, columns.name(role)) is not None for role in needed)


def named(table: Table, role: str, columns: Columns) -> str:
    """The column that has this role.

    Raises:
        InputError: There is none, or more than one; offers what the file seems to have.
    """
    wanted = columns.name(role)
    name = find(table.names, wanted)
    if name is None:
        if role == "label" and len(several := _flags(table, columns)) > 1:
            raise InputError(
                f"'{table.source}' has no column '{printable(wanted)}', but columns of 0 and 1: "
                f"{', '.join(map(printable, several[:8]))}; kdcli learns one label a row, not several",
                "write one column with the name of the label that a row has",
            )
        if any(len(one.split()) > _WORDS_OF_A_NAME for one in table.names):
            raise InputError(
                f"'{table.source}' has no column '{printable(wanted)}': its first line seems to be a row, not the "
                f"names of the columns: {listed(table.names)}",
                "write the names into the first line, for example text,label",
            )
        offer = _offer(table, columns)
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
    if "label" not in chosen and find(left, "label") is None:
        texts = {find(left, chosen.get(role, role)) for role in ROLES[:-1]}
        rest = [name for name in left if name not in texts]
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
        if name not in taken and {str(v) for v in table.column(name)[:_LOOKED_AT]} == {"0", "1"}
    ]
