"""Any number of labels a row: as lists, as cells with a separator, as columns of 0 and 1; and what is none of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcli.data import hub
from kdcli.data.columns import Columns, parse_columns
from kdcli.data.readers import extract, read
from kdcli.data.sources import Judging, load
from tests.data.test_kinds import SETS, refusal, table, texts


def sets(values: list[Any], columns: str | None = None, name: str = "labels") -> Any:
    given = table(text=texts(len(values)), **{name: values})
    return extract(given, parse_columns(columns), SETS).rows.labels


def test_lists() -> None:
    assert sets([["b", "a", "b"], [], None, ["c "]]) == [("a", "b"), (), ("c",)]
    assert sets([[1, 0], [2.0]]) == [("0", "1"), ("2",)]
    assert sets([["x;y"], ["z, w"]]) == [("x;y",), ("z, w",)]  # a name in a list may hold a separator
    assert sets([["a"], ["b"]], name="label") == [("a",), ("b",)]
    assert sets([[3, 1], ["LABEL_0"]], "labels=labels:ids") == [("1", "3"), ("0",)]
    part = extract(table(text=texts(3), labels=[["a"], None, []]), Columns(), SETS)
    assert (part.without_label, part.rows.first, part.lines) == (1, ["text 0", "text 2"], [2, 4])
    assert sets([None, None]) is None
    assert sets([[], []]) == [(), ()]


def test_cells() -> None:
    assert sets(["a; b", "b", "", " ; c"], "labels=labels:sep=;") == [("a", "b"), ("b",), (), ("c",)]
    assert sets(["27,8", "8"], "labels=labels:ids:sep=,") == [("27", "8"), ("8",)]
    assert sets(["", " "], "labels=labels:sep=;") is None
    # One label a row is a set of one where the name of the column, or the user, says that it is meant.
    assert sets(["a", "b", "a"]) == [("a",), ("b",), ("a",)]
    assert sets(["a", "b"], "labels=tag", "tag") == [("a",), ("b",)]
    assert sets([2, 0], "labels=tag", "tag") == [("2",), ("0",)]


@pytest.mark.parametrize(
    "values",
    [
        [[0, 1], [1, 1]],
        [["1", "0"], ["0", "0"]],
        [["1.0", "0.0"], ["0.0", "0.0"]],
        [["True", "False"], ["False", "False"]],
        [[True, False], [False, False]],
        [[1.0, 0.0], [0.0, 0.0]],
    ],
)
def test_flags_are_0_and_1_however_they_are_written(values: list[list[Any]]) -> None:
    a, b = (list(column) for column in zip(*values, strict=True))
    rows = extract(table(text=texts(2), a=a, b=b), parse_columns("labels=a+b")).rows
    expected = [
        tuple(n for n, v in zip("ab", row, strict=True) if str(v) in ("1", "1.0", "True")) for row in values
    ]
    assert rows.labels == expected


def test_flags_by_a_pattern_and_rows_that_nobody_has_labelled() -> None:
    given = table(
        text=texts(3), query=["0", "1", "1"], is_a=["1", "-1", ""], is_b=["0", "-1", ""], id=["1", "2", "3"]
    )
    part = extract(given, parse_columns("labels=is_*"))
    assert part.rows.labels == [("is_a",)]
    assert part.without_label == 2
    # A column that is called so is one column.
    whole = table(**{"text": texts(2), "a+b": ["x", "y"], "a": ["0", "1"], "b": ["0", "1"]})
    assert extract(whole, parse_columns("labels=a+b")).rows.labels == [("x",), ("y",)]


@pytest.mark.parametrize(
    ("values", "said", "message"),
    [
        ([["a"], [["b"]]], None, "line 3: a list in column 'labels' has ['b']; a label is a name"),
        ([["a"], [None]], None, "line 3: a list in column 'labels' has None"),
        ([["a"], [True]], None, "line 3: a list in column 'labels' has True"),
        ([["a"], [0.5]], None, "line 3: a list in column 'labels' has 0.5"),
        ([["a"], [" "]], None, "line 3: a list in column 'labels' has ' '"),
        ([["a"], [{"b": 1}]], None, "line 3: a list in column 'labels' has {'b': 1}"),
        ([["a"], "b"], None, "line 3: column 'labels' has 'b', but lists in other rows"),
        ([["a", "b"], "a,b"], None, "line 3: column 'labels' has 'a,b', but lists in other rows"),
        ([["a\ud800"]], None, "line 2: column 'labels' holds half of a surrogate pair"),
        ([[0, 1, 0], [1, 1, 0]], None, "hold 3 values of 0 and 1 each, a place a label"),
        ([[1.0, 0.0], [0.0, 0.0]], None, "hold 2 values of 0 and 1 each, a place a label"),
        ([["a"]], "labels=labels:sep=;", "holds lists, which need no separator"),
        (["a;b", "b", "a"], None, "--columns 'labels=labels:sep=;'"),
        (["a|b", "b", "a"], "labels=labels:sep=;", "--columns 'labels=labels:sep=|'"),
        (["['a', 'b']", "['a']"], "labels=labels", "holds lists, such as ['a', 'b']"),
        ([[0], [-1]], "labels=labels:ids", "line 3: column 'labels' has '-1', which is not an id"),
        ([["a"], ["b"]], "labels=labels:ids", "line 2: column 'labels' has 'a', which is not an id"),
        # As in data sets for other libraries, where these mean "not labelled".
        ([[2], [-100]], None, "line 3: column 'labels' has -100, which is no label"),
        ([[0, 1, 0], [1, -100, 0]], None, "line 3: column 'labels' has -100, which is no label"),
        (["0;2", "1", "-1"], "labels=labels:sep=;", "line 4: column 'labels' has -1, which is no label"),
        ([["a"]], "labels=a+b", "no column is 'a'"),
        ([["a"]], "labels=is_*", "no column is 'is_*'"),
        ([["a"]], "labels=tags", "no column 'tags'"),
        ([["a"]], "labels=labels+lab*", "names 'labels' twice"),
    ],
)
def test_what_is_no_set_of_labels(values: list[Any], said: str | None, message: str) -> None:
    assert message in refusal(table(text=texts(len(values)), labels=values), said, SETS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "line 3: column 'b' has '2'; a column of one label holds 0 and 1 alone"),
        ("x", "line 3: column 'b' has 'x'"),
        ([1], "line 3: column 'b' has [1]"),
        ("", "line 3: the label in column 'b' is missing; write 0 where a label does not apply"),
        (None, "line 3: the label in column 'b' is missing"),
        (-1, "line 3: the label in column 'b' is missing"),
    ],
)
def test_what_is_no_flag(value: Any, message: str) -> None:
    given = table(text=texts(2), a=["1", "0"], b=["0", value])
    assert message in refusal(given, "labels=a+b")


FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "labels": datasets.Sequence(datasets.ClassLabel(names=["joy", "fear"])),
    }
)


def test_lists_of_numbered_classes_have_their_names(tmp_path: Path) -> None:
    rows = {"text": texts(3), "labels": [[1, 0], [], [1]]}
    made = datasets.Dataset.from_dict(rows, features=FEATURES)
    expected = [
        tuple(sorted(made.features["labels"].feature.int2str(i) for i in row)) for row in made["labels"]
    ]
    made.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", Columns()).rows.labels == expected
    assert read(tmp_path / "a.parquet", parse_columns("labels=labels:ids")).rows.labels == [
        ("0", "1"),
        (),
        ("1",),
    ]
    assert extract(hub._table("org/x train", made), Columns()).rows.labels == expected
    made.save_to_disk(tmp_path / "saved")
    data = load(str(tmp_path / "saved"), judging=Judging())
    assert (data.kind, data.splits["test"].labels) == ("any-of", expected)
    metadata = {
        b"huggingface": json.dumps({"info": {"features": {"labels": [{"names": ["x", "y"]}]}}}).encode()
    }
    plain = pa.table({"text": texts(1), "labels": [[1]]}).replace_schema_metadata(metadata)
    pq.write_table(plain, tmp_path / "old.parquet")
    assert read(tmp_path / "old.parquet", Columns()).rows.labels == [("y",)]
