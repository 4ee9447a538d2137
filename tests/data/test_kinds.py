"""Sets of labels and numbers beside classes: how they are told apart, read, and refused."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kdcli.data.columns import Columns, parse_columns
from kdcli.data.readers import extract, read, recognised
from kdcli.data.sources import Judging, load, load_texts
from kdcli.data.tables import Table
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError, KdcliError
from kdcli.tasks.task import Kind

SETS = Wanted("any-of")
NUMBERS = Wanted("number")


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table("a.csv", list(columns), range(2, count + 2), lambda name: columns[name])


def texts(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def numbers(values: list[Any], **more: list[Any]) -> Any:
    given = table(text=texts(len(values)), label=values, **more)
    return extract(given, Columns(), NUMBERS).rows.labels


def refusal(given: Table, columns: str | None = None, wanted: Wanted | None = None) -> str:
    """The one line that a user gets."""
    with pytest.raises(InputError) as caught:
        extract(given, parse_columns(columns), wanted)
    said = f"{caught.value}; {caught.value.hint}"
    assert "\n" not in said
    assert caught.value.exit_code == 3
    return said


@pytest.mark.parametrize(
    ("columns", "said", "kind"),
    [
        ({"labels": [["a"], []]}, None, "any-of"),
        ({"label": [None, ["a", "b"]]}, None, "any-of"),
        ({"label": ["2.5", "3"]}, None, "number"),
        ({"label": [0.5, None]}, None, "number"),
        ({"score": [0.5, 1.0]}, None, "number"),
        ({"label": [1.0, 2.0]}, None, "one-of"),
        ({"label": ["a", "2.5"]}, None, "one-of"),
        ({"label": ["2,5", "3"]}, None, "one-of"),  # refused there
        ({"label": [True, False]}, None, "one-of"),
        ({"score": [1, 2]}, None, "one-of"),  # not found there
        ({"labels": ["a", "b"]}, None, "one-of"),  # not found there
        ({"labels": ["a", "b"]}, "labels=labels", "any-of"),
        ({"label": [0.5, 1.5], "labels": [["a"], ["b"]]}, None, "number"),  # label comes first
        ({"label": [1, 0], "q": ["x", "x"]}, "query=q", "number"),
        ({"label": [0.5, 1.5]}, "label=label:ids", "one-of"),  # refused there
        # Relevance in whole numbers, of rows that share a query.
        ({"label": [0, 3, 1], "query": ["x", "x", "y"]}, None, "number"),
        ({"label": ["0", "3", "1"], "query": ["7", "7", "8"]}, None, "number"),
        ({"score": [1, 2, 1], "query": ["x", "x", "y"]}, None, "number"),
        ({"label": [0, 3, 1], "query": ["x", "y", "z"]}, None, "one-of"),  # nothing to rank
        ({"label": [0, 4, 0], "query": ["NO_QUERY"] * 3}, None, "one-of"),  # as in collections of posts
        ({"label": ["a", "b", "a"], "query": ["x", "x", "y"]}, None, "one-of"),
        ({"label": [True, False, True], "query": ["x", "x", "y"]}, None, "one-of"),
        ({"label": [0, 3, 1], "query": ["x", "x", "y"]}, "label=label:ids", "one-of"),
        ({"label": [None, None]}, None, None),
        ({"label": ["", ""]}, None, None),
    ],
)
def test_the_data_tell_their_kind(columns: dict[str, list[Any]], said: str | None, kind: Kind | None) -> None:
    rows = len(next(iter(columns.values())))
    assert recognised(table(text=texts(rows), **columns), parse_columns(said)) == kind


def test_a_query_that_is_the_text_ranks_nothing() -> None:
    assert recognised(table(query=["x", "x", "y"], label=[0, 3, 1]), parse_columns("text=query")) == "one-of"
    named = table(id=["1", "2", "3"], query=["x", "x", "y"], passage=texts(3), label=[0, 3, 1])
    assert recognised(named, Columns()) == "number"


def test_what_was_taken_is_told_with_the_way_out(tmp_path: Path) -> None:
    rows = [{"query": f"q{i // 4}", "passage": f"p{i}", "label": i % 4} for i in range(160)]
    path = write(tmp_path / "graded.jsonl", rows)
    taken = load(str(path))
    assert taken.kind == "number"
    assert any("--task text-classification" in note and "ranked" in note for note in taken.notes)
    broken = write(tmp_path / "scores.jsonl", [row | {"label": i / 8} for i, row in enumerate(rows)])
    (note,) = (one for one in load(str(broken)).notes if "number" in one)
    assert note.endswith("is a number, by which the rows of a query are ranked")  # and no classes
    wanted = Wanted("one-of", "--task text-classification")
    classes = load(str(path), wanted=wanted, columns="text_a=query,text_b=passage")
    assert (classes.kind, classes.label_names) == ("one-of", ["0", "1", "2", "3"])


def test_numbers() -> None:
    assert numbers(["1", "2.50", "-3e-1", " .5 "]) == [1.0, 2.5, -0.3, 0.5]
    assert numbers([1, 2.5, 0]) == [1.0, 2.5, 0.0]
    assert numbers([Decimal("1.25"), Decimal(3)]) == [1.25, 3.0]  # of parquet
    assert recognised(table(text=texts(2), label=[Decimal("1.25"), Decimal(3)]), Columns()) == "number"
    assert numbers([None, "", float("nan")]) is None
    assert numbers([-1.0, -1]) is None  # as GLUE hides the answers of a test split
    assert numbers([-1, 2]) == [-1.0, 2.0]
    score = table(text=texts(2), score=[1, 2])
    assert extract(score, Columns(), NUMBERS).rows.labels == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan"), None], "line 3: the number in column 'label' is missing, as in 1 further rows"),
        (["1", "nan"], "line 3: the number in column 'label' is missing; give these rows a number"),
        ([1.0, float("inf")], "line 3: the label in column 'label' is inf, which is not a finite number"),
        (
            ["1", "-Infinity"],
            "line 3: the label in column 'label' is -Infinity, which is not a finite number",
        ),
        (["1", "1e999"], "is 1e999, which is not a finite number"),
        ([1, 1e39], "is 1e+39, which is not a finite number of 32 bits"),
        ([1, 10**400], "which is not a finite number"),
        (["1", "2,5"], "line 3: the label in column 'label' is '2,5', with a comma; write a decimal point"),
        (["1", "good"], "line 3: the label in column 'label' is 'good', which is not a number"),
        ([1, True], "is True, which is not a number"),
        ([1, [2]], "is [2], which is not a number"),
        (["1", "0x10"], "is '0x10', which is not a number"),
    ],
)
def test_what_is_no_number(values: list[Any], message: str) -> None:
    assert message in refusal(table(text=texts(len(values)), label=values), None, NUMBERS)


@pytest.mark.parametrize(
    ("columns", "said", "kind", "message"),
    [
        (
            {"labels": [["a"], ["b"]]},
            None,
            "one-of",
            "lists of labels in column 'labels', but the model 'm' has one of several classes as answer",
        ),
        (
            {"label": [["a"], ["b"]]},
            None,
            "one-of",
            "is a list, as of several labels, but the model 'm' has one of several classes as answer",
        ),
        (
            {"label": ["a", "b"]},
            None,
            "any-of",
            "the label column 'label' has one label a row, but the model 'm' has any of several labels as answer",
        ),
        (
            {"label": [0.5, 1.5]},
            None,
            "one-of",
            "looks like scores (regression), not classes: 2 different numbers, from 0.5 to 1.5 (0.5, 1.5, ...), but "
            "the model 'm' has one of several classes as answer",
        ),
        (
            {"label": ["a", "b"]},
            None,
            "number",
            "'a', which is not a number, but the model 'm' has a number as answer",
        ),
        (
            {"label": [["a"], ["b"]]},
            None,
            "number",
            "['a'], which is not a number, but the model 'm' has a number",
        ),
        (
            {"t": ["a", "b"]},
            "labels=t",
            "one-of",
            "any number of labels, but the model 'm' has one of several",
        ),
        ({"t": ["a", "b"]}, "labels=t", "number", "any number of labels, but the model 'm' has a number"),
        (
            {"label": [1, 2]},
            "label=label:ids",
            "number",
            "the labels are classes, but the model 'm' has a number",
        ),
        (
            {"label": [1, 2], "q": ["a", "b"]},
            "query=q",
            "one-of",
            "rows to be ranked, but the model 'm' has one of",
        ),
    ],
)
def test_models_and_data_that_contradict_each_other_are_both_named(
    columns: dict[str, list[Any]], said: str | None, kind: Kind, message: str
) -> None:
    assert message in refusal(table(text=texts(2), **columns), said, Wanted(kind, "the model 'm'"))


def test_one_label_in_a_column_of_labels_is_asked_about() -> None:
    given = table(text=texts(2), labels=["a", "b"])
    assert "--columns label=labels; or labels= for label=, where a row can have several" in refusal(given)
    assert extract(given, parse_columns("label=labels")).rows.labels == ["a", "b"]
    assert extract(given, parse_columns("labels=labels")).rows.labels == [("a",), ("b",)]


def test_integers_that_are_hardly_classes_are_asked_about() -> None:
    given = table(text=texts(40), label=[i * i for i in range(40)])
    assert "--task regression" in refusal(given)
    assert extract(given, Columns(), NUMBERS).rows.labels == [float(i * i) for i in range(40)]


QUERIES = ["who", "who", "what"]


@pytest.mark.parametrize("passage", ["text", "passage", "document"])
def test_a_query_and_what_it_ranks_are_the_pair(passage: str) -> None:
    given = table(**{"query": QUERIES, passage: texts(3), "label": [1, 0, 1]})
    rows = extract(given, Columns(), NUMBERS).rows
    assert (rows.first, rows.second, rows.queries) == (QUERIES, texts(3), QUERIES)
    assert rows.take([2]).queries == ["what"]


def test_queries_beside_pairs_under_other_names_and_as_numbers_of_groups() -> None:
    pairs = table(query=["7", "7", "8"], text_a=texts(3), text_b=QUERIES, label=[1, 0, 1])
    rows = extract(pairs, Columns(), NUMBERS).rows
    assert (rows.first, rows.second, rows.queries) == (texts(3), QUERIES, ["7", "7", "8"])
    named = table(q=QUERIES, body=texts(3), label=[1, 0, 1])
    rows = extract(named, parse_columns("query=q,text=body")).rows
    assert (rows.first, rows.second, rows.queries) == (QUERIES, texts(3), QUERIES)
    groups = table(query=[7, 7, 8], passage=texts(3), label=[1, 0, 1])
    rows = extract(groups, Columns(), NUMBERS).rows
    assert (rows.first, rows.second, rows.queries) == (texts(3), None, ["7", "7", "8"])
    # Classes do not rank: the column of queries is one like any other, as ever.
    classes = table(query=QUERIES, text=texts(3), label=[1, 0, 1])
    rows = extract(classes, Columns(), Wanted("one-of", "--task text-classification")).rows
    assert (rows.first, rows.second, rows.queries) == (texts(3), None, None)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "line 4: the query in column 'query' is missing"),
        (" ", "line 4: the query in column 'query' is missing"),
        (0.5, "line 4: the query in column 'query' is neither text nor a whole number"),
    ],
)
def test_what_is_no_query(query: Any, message: str) -> None:
    given = table(query=["a", "b", query], text_a=texts(3), text_b=texts(3), label=[1, 2, 3])
    assert message in refusal(given, None, NUMBERS)
    assert "no column 'q'" in refusal(table(text=texts(2), label=[1, 2]), "query=q")


def test_pairs_of_a_similarity_benchmark_are_offered() -> None:
    given = table(sentence1=texts(2), sentence2=texts(2), score=[0.5, 1])
    said = refusal(given)
    offer = said.partition("--columns ")[2]
    assert offer == "text_a=sentence1,text_b=sentence2,label=score"
    assert extract(given, parse_columns(offer)).rows.labels == [0.5, 1.0]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_lists_and_numbers_are_those_of_pandas(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "text": texts(50),
            "labels": [list(rng.choice(list("abcd"), rng.integers(0, 4), replace=False)) for _ in range(50)],
        }
    )
    scores = pd.DataFrame({"text": texts(50), "score": rng.random(50)})
    path = tmp_path / f"a.{form}"

    def kept(given: pd.DataFrame) -> pd.DataFrame:
        if form == "parquet":
            given.to_parquet(path)
            return pd.read_parquet(path)
        given.to_json(path, orient="records", lines=form == "jsonl", double_precision=15)
        return pd.read_json(path, lines=form == "jsonl", precise_float=True)

    again = kept(frame)
    assert read(path, Columns()).rows.labels == [tuple(sorted(row)) for row in again["labels"]]
    again = kept(scores)
    assert read(path, Columns()).rows.labels == again["score"].tolist()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("names", "row", "said", "label"),
    [
        (["text", "a", "b"], ["x", "0", "1"], "labels=a+b", ("b",)),
        (["text", "is_a", "is_b"], ["x", "1", "1"], "labels=is_*", ("is_a", "is_b")),
        (["text", "tags"], ["x", "u+v"], "labels=tags", ("u+v",)),
        (["query", "passage", "score"], ["q", "p", "0.5"], None, 0.5),
        (["text_a", "text_b", "score"], ["q", "p", "0.5"], None, 0.5),
    ],
)
def test_the_columns_needed_tell_the_separator_of_the_file(
    tmp_path: Path, separator: str, names: list[str], row: list[str], said: str | None, label: Any
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("".join(separator.join(line) + "\n" for line in (names, row)))
    rows = read(path, parse_columns(said)).rows
    assert rows.labels == [label]
    assert (rows.second is None) == (names[0] == "text")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged(count: int) -> list[dict[str, Any]]:
    return [{"text": f"t{i}", "labels": [x for j, x in enumerate("abc") if i >> j & 1]} for i in range(count)]


def test_a_folder_is_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", tagged(16))
    write(tmp_path / "validation.jsonl", tagged(4))
    write(tmp_path / "test.jsonl", [*tagged(2), {"text": "x", "labels": None}])
    data = load(str(tmp_path))
    assert (data.kind, data.label_names, data.ids_option) == ("any-of", ["a", "b", "c"], "labels=labels:ids")
    assert data.splits["test"].labels == [(), ("a",)]
    assert ("rows-without-label", "1 rows of test have no label and are left out") in data.warnings
    assert any("a row can have any number of labels" in note for note in data.notes)
    assert load(str(tmp_path), wanted=SETS).fingerprint == data.fingerprint
    write(tmp_path / "test.jsonl", [{"text": "x", "labels": ["a", "d"]}] * 2)
    with pytest.raises(InputError, match="line 1: the label 'd' of the test split is not in train"):
        load(str(tmp_path))
    write(tmp_path / "test.jsonl", [{"text": "x", "label": "a"}] * 2)
    with pytest.raises(
        InputError, match="has one label a row, but the train split has any of several labels"
    ):
        load(str(tmp_path))
    write(tmp_path / "train.jsonl", [{"text": f"t{i}", "labels": ["a"]} for i in range(4)])
    write(tmp_path / "test.jsonl", tagged(2))
    with pytest.raises(InputError, match="the rows of train have 1 label; two labels are needed"):
        load(str(tmp_path))
    write(tmp_path / "train.jsonl", [{"text": f"t{i}", "labels": []} for i in range(4)])
    write(tmp_path / "test.jsonl", [{"text": "x", "labels": []}] * 2)
    with pytest.raises(InputError, match="the rows of train have no labels; two labels are needed"):
        load(str(tmp_path))


def test_numbers_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": i / 2} for i in range(8)])
    write(tmp_path / "validation.jsonl", [{"text": f"v{i}", "label": i} for i in range(4)])  # as train says
    data = load(str(tmp_path))
    assert (data.kind, data.label_names) == ("number", [])
    assert data.splits["validation"].labels == [0.0, 1.0, 2.0, 3.0]
    write(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": i} for i in range(4)])
    write(tmp_path / "validation.jsonl", [{"text": f"v{i}", "label": i / 2} for i in range(4)])
    with pytest.raises(
        InputError, match=r"looks like scores .* but the train split has one of several classes"
    ):
        load(str(tmp_path))
    assert load(str(tmp_path), wanted=NUMBERS).kind == "number"
    write(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": 0.5} for i in range(4)])
    with pytest.raises(InputError, match="every row of train has the same number"):
        load(str(tmp_path))


def test_the_fingerprint_covers_sets_numbers_and_queries(tmp_path: Path) -> None:
    base = {"query": "q", "passage": "p"}

    def fingerprint(queries: list[str], labels: list[float]) -> str:
        rows = [
            base | {"query": q, "passage": f"p{i}", "label": x}
            for i, (q, x) in enumerate(zip(queries, labels, strict=True))
        ]
        return load(str(write(tmp_path / "a.jsonl", rows)), judging=Judging(), wanted=NUMBERS).fingerprint

    first = fingerprint(["a", "b"], [0.5, 1.0])
    assert first == fingerprint(["a", "b"], [0.5, 1])
    assert len({first, fingerprint(["a", "b"], [0.5, 1.5]), fingerprint(["a", "c"], [0.5, 1.0])}) == 3


def test_an_alias_of_classes_answers_no_other_kind() -> None:
    with pytest.raises(KdcliError, match="has one label a row, but --task regression has a number as answer"):
        load("rotten-tomatoes", wanted=Wanted("number", "--task regression"))


def test_texts_without_labels_are_pairs_as_the_labelled_rows_are(tmp_path: Path) -> None:
    path = write(tmp_path / "more.jsonl", [{"query": "q", "text": "p"}])
    assert load_texts(path, kind="number").second == ["p"]
    assert load_texts(path, kind="number").queries is None
    assert load_texts(path).second is None
