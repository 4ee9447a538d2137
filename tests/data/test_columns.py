from __future__ import annotations

from typing import Any

import pytest

from kdcli.data.columns import Columns, named, parse_columns
from kdcli.data.readers import extract
from kdcli.data.tables import Table
from kdcli.errors import InputError, UsageError


def table(**columns: list[Any]) -> Table:
    return Table("a.csv", list(columns), range(len(next(iter(columns.values())))), lambda name: columns[name])


TEXT = ["a film of some length", "another film of some length"]


@pytest.mark.parametrize(
    ("given", "offer"),
    [
        ({"sentence": TEXT, "label": [0, 1]}, "text=sentence"),
        ({"idx": [0, 1], "Review": TEXT, "Sentiment": ["a", "b"]}, "text=Review,label=Sentiment"),
        (
            {"premise": TEXT, "hypothesis": TEXT, "gold_label": ["a", "b"]},
            "text_a=premise,text_b=hypothesis,label=gold_label",
        ),
        (
            {"question1": TEXT, "question2": TEXT, "is_duplicate": [0, 1]},
            "text_a=question1,text_b=question2,label=is_duplicate",
        ),
        ({"phrase": TEXT, "grade": ["a", "b"]}, "text=phrase,label=grade"),
        ({"comment_text": TEXT, "toxic": ["0", "1"], "insult": ["1", "0"]}, "text=comment_text"),
        ({"text": TEXT, "target": [0, 1]}, "label=target"),
        ({"text": TEXT, "toxic": [0, 1]}, "label=toxic"),
        (
            {"query": TEXT, "passage": TEXT, "relevance": [0.5, 1.5]},
            "text_a=query,text_b=passage,label=relevance",
        ),
        ({"query": [1, 2], "passage": TEXT, "relevance": [0.5, 1.5]}, "text=passage,label=relevance"),
        ({"query": [1, 2], "text": TEXT, "grade": [0.5, 1.5]}, "label=grade"),
    ],
)
def test_the_likely_columns_are_offered(given: dict[str, list[Any]], offer: str) -> None:
    with pytest.raises(InputError, match="has no column") as caught:
        extract(table(**given), Columns())
    assert f"--columns {offer}" in str(caught.value.hint)
    if "insult" not in given:
        assert len(extract(table(**given), parse_columns(offer)).rows) == 2


def test_nothing_is_offered_where_the_names_say_too_little() -> None:
    with pytest.raises(InputError) as caught:
        extract(table(a=TEXT, b=TEXT, c=["x", "y"]), Columns())
    assert "name the columns with --columns text=NAME" in str(caught.value.hint)


def test_columns_of_flags_are_offered_as_labels() -> None:
    given = table(text=TEXT, toxic=["0", "1"], insult=["1", "0"], threat=[0, 0])
    with pytest.raises(InputError, match="columns of 0 and 1: toxic, insult, threat") as caught:
        extract(given, Columns())
    option = "labels=toxic+insult+threat"
    assert caught.value.hint == f"if each is a label that a row may have: --columns {option}"
    assert extract(given, parse_columns(option)).rows.labels == [("insult",), ("toxic",)]


def test_names_that_differ_in_case_alone() -> None:
    assert named(table(Text=TEXT, LABEL=["a", "b"]), "text", Columns()) == "Text"
    with pytest.raises(InputError, match="no column 'text'"):
        named(table(Text=TEXT, TEXT=TEXT), "text", Columns())


def test_ids() -> None:
    assert parse_columns("text=s, label=l:ids") == Columns({"text": "s", "label": "l"}, ids=True)
    assert parse_columns("label=l").ids is False
    assert parse_columns("text=a:ids") == Columns({"text": "a:ids"})
    assert parse_columns("label=l,text=s").with_ids() == "text=s,label=l:ids"
    assert Columns().with_ids() == "label=label:ids"
    with pytest.raises(UsageError, match="not ROLE=NAME"):
        parse_columns("label=:ids")


def test_labels() -> None:
    assert parse_columns("labels=tags") == Columns({"labels": "tags"})
    for given in ("labels=tags:sep=;:ids,text=s", "text=s,labels=tags:ids:sep=;"):
        assert parse_columns(given) == Columns({"labels": "tags", "text": "s"}, ids=True, separator=";")
    assert parse_columns("labels=tags:sep=,,text=s") == Columns(
        {"labels": "tags", "text": "s"}, separator=","
    )
    assert parse_columns("labels=tags:sep=,") == Columns({"labels": "tags"}, separator=",")
    assert parse_columns("labels=tags:sep=|").with_ids("labels") == "labels=tags:ids:sep=|"
    assert Columns().with_ids("labels", "Labels") == "labels=Labels:ids"
    with pytest.raises(UsageError, match=r"'/' can't separate labels: choose one of ; \| ,"):
        parse_columns("labels=tags:sep=/")
    with pytest.raises(UsageError, match="either label=NAME, or labels=NAME"):
        parse_columns("labels=tags,label=tag")
    with pytest.raises(UsageError, match="not ROLE=NAME"):
        parse_columns("labels=:sep=;")
