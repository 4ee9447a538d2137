"""What a label column means, and what is no label of a classifier."""

from __future__ import annotations

from typing import Any

import pytest

from kdcli.data.answers import read_labels
from kdcli.data.columns import parse_columns
from kdcli.data.label_sets import read_sets
from kdcli.data.tables import Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError


def labels(values: list[Any], *, ids: bool = False) -> list[str | None]:
    table = Table("a.csv", ["label"], range(2, len(values) + 2), lambda name: values)
    return read_labels(table, "label", ids=ids)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0.0", "1.0", "1.0"], ["0", "1", "1"]),
        ([0.0, 1.0], ["0", "1"]),
        (["0", "1."], ["0", "1"]),
        ([True, False], ["true", "false"]),
        (["True", "False", "TRUE", "false"], ["true", "false", "true", "false"]),
        (["True", "False", "Unknown"], ["True", "False", "Unknown"]),
        (["NA", "none", "null"], ["NA", "none", "null"]),  # names, where all labels are words
        (["-1", "1", "1"], ["-1", "1", "1"]),  # two classes: nothing is 0
        (["1.0", "one"], ["1.0", "one"]),
        ([str(i) for i in range(150)] * 2, [str(i) for i in range(150)] * 2),
        # Class numbers of a shop: far apart, but they come back.
        ([str(i * i) for i in range(30)] * 4, [str(i * i) for i in range(30)] * 4),
    ],
)
def test_spellings(values: list[Any], expected: list[str]) -> None:
    assert labels(values) == expected


def test_minus_one_is_no_label() -> None:
    values = ["0", "1", "2"] * 10 + ["-1"]
    assert labels(values) == [None if v == "-1" else v for v in values]
    assert labels([-1.0, -1.0]) == [None, None]
    assert labels(["-1", "0", "1"], ids=True) == [None, "0", "1"]
    # negative, neutral, positive: -1 is too frequent to be left out without a question
    with pytest.raises(InputError, match=r"-1 in 2 of 6 rows beside 0, 1: it may be a class") as caught:
        labels(["-1", "0", "1"] * 2)
    assert "--columns label=label:ids" in str(caught.value.hint)


def test_nothing_at_all_is_no_label_but_a_hole_is_an_error() -> None:
    assert labels([None, None]) == [None, None]
    assert labels(["", " "]) == [None, None]
    with pytest.raises(InputError, match=r"a.csv, line 3: .* is missing, as in 1 further rows"):
        labels([1.0, float("nan"), None])
    with pytest.raises(InputError, match="has 'nan' beside numbers, in 2 rows: these labels are missing"):
        labels(["0.0", "nan", "1.0", "nan"])


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.5, 1.0, 1.5] * 5,
        ["3.8", "2.25", "5.0"],
        ["0.5"] * 4,
        [str(i * i) for i in range(40)],
        [7.1, 8],
        ["0,0", "0,5", "1,0", "1,5", "3"],
    ],
)
def test_scores_are_no_classes(values: list[Any]) -> None:
    with pytest.raises(InputError, match=r"looks like scores \(regression\), not classes"):
        labels(values)


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        (["toxic", "insult", "toxic;insult", "none"], ";"),
        (["negative", "positive", "negative,positive"], ","),
        (["a|b", "b|c", "c", "a|c"], "|"),
        (["a;b", "b;c", "c;a"], ";"),
        (["27", "8", "8,27"], ","),
        (["['joy', 'fear']", "['joy']", "[]x"], None),
        (["[0 1]", "[1 0]"], None),
    ],
)
def test_several_labels_in_one_cell_are_refused_with_the_way_to_say_so(
    values: list[str], separator: str | None
) -> None:
    with pytest.raises(InputError, match=r"holds (several labels a row|lists)") as caught:
        labels(values)
    option = f"--columns 'labels=label:sep={separator or ';'}'"
    assert option in str(caught.value.hint)
    if separator is not None:
        columns = parse_columns(option.split("'")[1])
        table = Table("a.csv", ["label"], range(2, len(values) + 2), lambda name: values)
        found = read_sets(table, "label", columns, Wanted("any-of"))
        assert found == [tuple(sorted(set(value.split(separator)))) for value in values]


def test_lists_are_no_single_labels() -> None:
    with pytest.raises(InputError, match="is a list, as of several labels") as caught:
        labels([["a"], ["a", "b"]])
    assert "--task multi-label" in str(caught.value.hint)


@pytest.mark.parametrize(
    "values",
    [
        ["Books", "Movies, Music & Games", "Arts, Crafts"],
        ["Politics, US", "Politics, UK", "Sport, US", "Sport, UK"],  # every part keeps its place
        ["news|politics", "news|sport", "shop|toys"],  # paths
        ["news|us", "news|uk", "sport|us", "sport|uk"],
        ["a;", ";b", "a"],
        ["Washington, D.C.", "Paris"],
    ],
)
def test_names_with_separators_are_names(values: list[str]) -> None:
    assert labels(values) == values


def test_ids_are_numbers() -> None:
    assert labels(["0", "1.0"], ids=True) == ["0", "1"]
    assert labels([True, False], ids=True) == ["1", "0"]
    assert labels(["LABEL_1", "LABEL_0"], ids=True) == ["1", "0"]
    for value in ("good", "-2", "99999999"):
        with pytest.raises(InputError, match="not an id that a model's label can have"):
            labels(["0", value], ids=True)
