"""Label names: their order, and how the labels of a data set meet those of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from kdcli.errors import InputError, did_you_mean

_NUMBER = re.compile(r"-?[0-9]{1,18}")
_GENERIC = re.compile(r"LABEL_([0-9]{1,9})")
_SHOWN = 12


def printable(name: str, width: int = 60) -> str:
    """A name from a file, safe for a terminal: no control characters, at most ``width`` characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[: width + 1])
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def suggest(given: str, allowed: Iterable[str]) -> str:
    """``did_you_mean`` for names that come from a file: made printable, and a long list shortened."""
    names = sorted({printable(name) for name in allowed})
    if len(names) <= _SHOWN:
        return did_you_mean(printable(given), names)
    likeliest = did_you_mean(printable(given), names).partition("choose one of: ")[0]
    return f"{likeliest}choose one of: {_listed(names)}"


def ordered(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted; numerically when every one of them is an integer."""
    distinct = set(names)
    if all(_NUMBER.fullmatch(name) for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def align(data_labels: Sequence[str], model_labels: Sequence[str]) -> dict[str, int]:
    """Find each data label in the model's label order, by name.

    A name is looked for as it is, then without regard to case where that is unique. A model whose
    labels are only LABEL_0, LABEL_1, ... says nothing about their meaning, so it is accepted only for
    data labels that are the numbers 0..n-1.

    Args:
        data_labels: The distinct labels of the data.
        model_labels: The model's labels; the position is the index of the logit.

    Returns:
        Data label -> index in ``model_labels``.

    Raises:
        InputError: A data label is unknown to the model, two of them mean the same label of the
            model, or the model's labels have no names.
    """
    if repeated := [name for name, count in Counter(model_labels).items() if count > 1]:
        raise InputError(f"the model has label '{printable(repeated[0])}' twice")
    exact = {name: i for i, name in enumerate(model_labels)}
    folds = Counter(name.casefold() for name in model_labels)
    folded = {name.casefold(): i for i, name in enumerate(model_labels) if folds[name.casefold()] == 1}
    found = {name: exact.get(name, folded.get(name.casefold())) for name in data_labels}
    unknown = [name for name, index in found.items() if index is None]
    if unknown:
        generic = [_GENERIC.fullmatch(name) for name in model_labels]
        if all(generic):
            numbers = {m.group(1): i for i, m in enumerate(generic) if m}
            if set(numbers) == set(data_labels):
                return {name: numbers[name] for name in data_labels}
            raise InputError(
                f"the model's {len(model_labels)} labels have no names ({_listed(model_labels)}), "
                f"so those of the data can't be matched: {_listed(data_labels)}",
                "put the names into id2label of the model's config.json, in the order of its logits",
            )
        unused = [name for name in model_labels if exact[name] not in found.values()]
        raise InputError(
            f"the model does not know these labels of the data: {_listed(unknown)}; "
            f"its labels that the data does not use: {_listed(unused)}",
            suggest(unknown[0], model_labels),
        )
    index = {name: i for name, i in found.items() if i is not None}
    taken = Counter(index.values())
    if same := [name for name, i in index.items() if taken[i] > 1]:
        raise InputError(
            f"the data's labels {_listed(same)} mean the same label of the model, "
            f"'{printable(model_labels[index[same[0]]])}'",
            "write every label in one way",
        )
    return index


def _listed(names: Sequence[str]) -> str:
    """The names for a message, a long list shortened."""
    if not names:
        return "none"
    rest = len(names) - _SHOWN
    return ", ".join(map(printable, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
