"""Label names: their order, and how the labels of a data set meet those of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from kdcli.errors import InputError, did_you_mean
from kdcli.names import SHOWN, listed, printable

_NUMBER = re.compile(r"-?[0-9]{1,18}")
_GENERIC = re.compile(r"LABEL_([0-9]{1,9})")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0*")


def plain(name: str) -> str:
    """A whole number without its empty fraction, anything else as it is.

    >>> plain("1.0"), plain("1.5")
    ('1', '1.5')
    """
    whole = _WHOLE.fullmatch(name)
    return name if whole is None else whole.group(1)


def number_of(name: str) -> int | None:
    """The id that a label can stand for: a whole number, LABEL_3, or a truth value; None for a name.

    >>> number_of("LABEL_3"), number_of("true"), number_of("good")
    (3, 1, None)
    """
    if name.casefold() in ("false", "true"):
        return int(name.casefold() == "true")
    generic = _GENERIC.fullmatch(name)
    digits = generic.group(1) if generic else name
    return int(digits) if _NUMBER.fullmatch(digits) and not digits.startswith("-") else None


def suggest(given: str, allowed: Iterable[str]) -> str:
    """``did_you_mean`` for names that come from a file: made printable, and a long list shortened."""
    names = sorted({printable(name) for name in allowed})
    if len(names) <= SHOWN:
        return did_you_mean(printable(given), names)
    likeliest = did_you_mean(printable(given), names).partition("choose one of: ")[0]
    return f"{likeliest}choose one of: {listed(names)}"


def ordered(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted; numerically when every one of them is an integer."""
    distinct = set(names)
    if all(_NUMBER.fullmatch(name) for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def align(
    data_labels: Sequence[str],
    model_labels: Sequence[str],
    *,
    ids: bool = False,
    option: str = "label=label:ids",
) -> dict[str, int]:
    """Find each data label in the model's label order, by name.

    A name is looked for as it is, then without regard to case and to a whole number's empty fraction, where
    that is unique. A model whose labels are only LABEL_0, LABEL_1, ... says nothing about their meaning, so
    it is accepted only for data labels that are the numbers 0..n-1, or false and true.

    Args:
        data_labels: The distinct labels of the data.
        model_labels: The model's labels; the position is the index of the logit.
        ids: The data labels are such positions.
        option: The value of ``--columns`` that says so.

    Returns:
        Data label -> index in ``model_labels``.

    Raises:
        InputError: A data label is unknown to the model, two of them mean the same label of the
            model, or the model's labels have no names.
    """
    if repeated := [name for name, count in Counter(model_labels).items() if count > 1]:
        raise InputError(f"the model has label '{printable(repeated[0])}' twice")
    if ids:
        return _by_id(data_labels, model_labels)
    exact = {name: i for i, name in enumerate(model_labels)}
    folds = Counter(map(_fold, model_labels))
    folded = {_fold(name): i for i, name in enumerate(model_labels) if folds[_fold(name)] == 1}
    found = {name: exact.get(name, folded.get(_fold(name))) for name in data_labels}
    if any(index is None for index in found.values()):
        generic = [_GENERIC.fullmatch(name) for name in model_labels]
        if all(generic):
            positions = {int(m.group(1)): i for i, m in enumerate(generic) if m}
            numbers = {name: number_of(name) for name in data_labels}
            if set(numbers.values()) == set(positions) and len(numbers) == len(positions):
                return {name: positions[n] for name, n in numbers.items() if n is not None}
        raise _unknown(found, model_labels, all(generic), option)
    index = {name: i for name, i in found.items() if i is not None}
    taken = Counter(index.values())
    if same := [name for name, i in index.items() if taken[i] > 1]:
        raise InputError(
            f"the data's labels {listed(same)} mean the same label of the model, "
            f"'{printable(model_labels[index[same[0]]])}'",
            "write every label in one way",
        )
    return index


def _fold(name: str) -> str:
    return plain(name).casefold()


def _by_id(data_labels: Sequence[str], model_labels: Sequence[str]) -> dict[str, int]:
    found = {}
    for name in data_labels:
        number = number_of(name)
        if number is None or number >= len(model_labels):
            raise InputError(
                f"the data's label '{printable(name)}' is not an id of the model, whose {len(model_labels)} labels "
                f"have the ids 0 to {len(model_labels) - 1}",
                "write the names of the labels instead, and leave ':ids' out of --columns",
            )
        found[name] = number
    return found


def _unknown(
    found: dict[str, int | None], model_labels: Sequence[str], generic: bool, option: str
) -> InputError:
    """Labels that the model does not know; offers ``--columns`` where they can be its ids."""
    numbers = {name: number_of(name) for name in found}
    can_be_ids = all(n is not None and n < len(model_labels) for n in numbers.values())
    offer = ""
    if can_be_ids:
        meaning = [f"{n} is {printable(model_labels[n])}" for n in sorted({n or 0 for n in numbers.values()})]
        offer = (
            f"if the numbers are the positions in the model's own list ({listed(meaning)}), say so: "
            f"--columns {option}"
        )
    if generic:
        names = "put the names into id2label of the model's config.json, in the order of its logits"
        return InputError(
            f"the model's {len(model_labels)} labels have no names ({listed(model_labels)}), "
            f"so those of the data can't be matched: {listed(list(found))}",
            f"{offer}; or {names}" if offer else names,
        )
    unknown = [name for name, index in found.items() if index is None]
    if all(n is not None for n in numbers.values()):
        return InputError(
            f"the labels of the data are numbers ({listed(list(found))}), those of the model are names "
            f"({listed(model_labels)})",
            offer
            if can_be_ids
            else f"write the names into the data: these numbers are no ids of the "
            f"model's {len(model_labels)} labels, which are 0 to {len(model_labels) - 1}",
        )
    unused = [name for i, name in enumerate(model_labels) if i not in found.values()]
    return InputError(
        f"the model does not know these labels of the data: {listed(unknown)}; "
        f"its labels that the data does not use: {listed(unused)}",
        suggest(unknown[0], model_labels),
    )
