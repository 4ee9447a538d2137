"""Labels as arrays, in the forms that kdcli.tasks.task promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from kdcli import tasks
from kdcli.data.sources import Dataset, Rows
from kdcli.errors import InputError
from kdcli.inputs import picked, sampling, targets
from kdcli.inputs.splits import Splits
from kdcli.inputs.text import Encoded, concatenate, encode, fingerprint
from kdcli.tasks.task import OF_TEXTS
from tests.inputs.test_text import make_tokenizer

SETS = [("a", "c"), (), ("b",), ("a", "b", "c"), ("c",)]
NAMES = ["c", "a", "unused", "b"]  # the model's own order
NAN = np.full(1, np.nan, np.float32)
INDEX = {"a": 1, "b": 3, "c": 0}


def rows(labels: list, queries: list[str] | None = None) -> Rows:  # type: ignore[type-arg]
    return Rows([f"a {'b ' * i}" for i in range(len(labels))], None, labels, queries)


def test_sets_are_those_of_scikit_learn() -> None:
    found = targets.as_array(SETS, "any-of", INDEX, 4)
    assert found.dtype == np.float32
    assert np.array_equal(found, MultiLabelBinarizer(classes=NAMES).fit_transform(SETS))
    assert targets.as_array([(), ()], "any-of", INDEX, 4).tolist() == [[0] * 4] * 2
    assert targets.as_array([], "any-of", INDEX, 4).shape == (0, 4)
    with pytest.raises(InputError, match="unknown label 'd'"):
        targets.as_array([("a",), ("b", "d")], "any-of", INDEX, 4)


def test_classes_and_numbers() -> None:
    classes = targets.as_array(["b", "c", "b"], "one-of", INDEX, 4)
    assert (classes.dtype, classes.tolist()) == (np.int64, [3, 0, 3])
    numbers = targets.as_array([0.1, 2.0], "number", {}, 1)
    assert numbers.dtype == np.float32
    assert np.array_equal(numbers, np.float32([0.1, 2.0]))


@pytest.mark.parametrize(
    ("labels", "kind", "fill", "expected"),
    [
        (["b", "c"], "one-of", np.array([-100]), [3, 0, -100]),
        (
            [("a", "c"), ()],
            "any-of",
            np.full((1, 4), np.nan, np.float32),
            [[1, 1, 0, 0], [0] * 4, [np.nan] * 4],
        ),
        ([0.5, 2.0], "number", np.full(1, np.nan, np.float32), [0.5, 2.0, np.nan]),
    ],
)
def test_rows_without_labels_get_those_of_one_row(
    labels: list, kind: str, fill: np.ndarray, expected: list
) -> None:  # type: ignore[type-arg]
    tokenizer = make_tokenizer()
    labelled = encode(rows(labels), tokenizer, 8, INDEX, kind=kind, outputs=4)
    bare = encode(Rows(["d"]), tokenizer, 8, None)
    assert labelled.labels is not None
    for both, order in (
        (concatenate(labelled, bare, fill), [0, 1, 2]),
        (concatenate(bare, labelled, fill), [1, 2, 0]),
    ):
        assert both.labels is not None
        assert both.labels.dtype == labelled.labels.dtype
        np.testing.assert_array_equal(both.labels[order], expected)
    again = concatenate(labelled, bare, fill).take([2, 0])
    np.testing.assert_array_equal(again.labels, [expected[2], expected[0]])
    assert fingerprint(labelled.take([0, 1])) == fingerprint(labelled) != fingerprint(labelled.take([1, 0]))


def test_queries_are_groups_through_take_and_concatenate() -> None:
    tokenizer = make_tokenizer()
    made = encode(rows([0.5, 1.0, 2.0], ["y", "x", "y"]), tokenizer, 8, {}, kind="number", outputs=1)
    assert made.queries is not None
    assert (made.queries.dtype, made.queries.tolist()) == (np.int64, [1, 0, 1])
    assert made.take([1, 2]).queries.tolist() == [0, 1]
    bare = encode(Rows(["d", "e"]), tokenizer, 8, None)
    assert concatenate(made, bare, NAN).queries.tolist() == [1, 0, 1, 2, 3]  # each a query of its own
    assert concatenate(bare, made, NAN).queries.tolist() == [0, 1, 3, 2, 3]
    assert concatenate(made, made, NAN).queries.tolist() == [1, 0, 1, 3, 2, 3]
    assert concatenate(bare, bare, NAN).queries is None
    without = Encoded(made.ids, made.type_ids, made.offsets, made.labels)
    assert fingerprint(without) != fingerprint(made)


def test_the_fingerprint_of_classes_is_what_it_was() -> None:
    """Teachers' outputs in caches of users are found by it."""
    made = encode(Rows(["a b", "c"], None, ["c", "b"]), make_tokenizer(), 8, INDEX)
    assert fingerprint(made) == "c2ec10ef8f9d2b6bfd8bd18dddbbdf116e5fdd5ddcbe0353cd5792fcc145c37b"


def test_whole_groups() -> None:
    groups = np.array([5, 1, 5, 2, 2, 9, 1, 9, 9])
    for seed in range(20):
        for count in (1, 4, 6, 9):
            at = sampling.whole_groups(groups, count, seed)
            taken = set(groups[at])
            assert (np.diff(at) > 0).all()
            assert sorted(at) == [i for i, group in enumerate(groups) if group in taken]
            assert len(at) <= count or len(taken) == 1
    assert len(sampling.whole_groups(groups, 9, 0)) == 9
    assert len({tuple(sampling.whole_groups(groups, 4, seed)) for seed in range(20)}) > 1


def dataset(test: Rows, kind: str) -> Dataset:
    return Dataset("d", {"test": test}, "f", [], kind=kind)


def test_the_rows_that_are_judged_of_sets_and_of_queries() -> None:
    sets = rows([("a",)] * 80 + [("a", "b")] * 20)
    limited = picked.pick(dataset(sets, "any-of"), None, 10)
    assert (limited.at >= 80).sum() == 2  # b has its share
    queries = rows([float(i % 2) for i in range(40)], [f"q{i % 10}" for i in range(40)])
    whole = picked.pick(dataset(queries, "number"), None, 12)
    assert np.bincount(whole.at % 10).max() == 4  # rows of a query
    assert len(whole.at) == 12
    known = picked.pick(dataset(queries, "number"), None, None).sha256
    other = Rows(queries.first, None, queries.labels, ["x", *(queries.queries or [])[1:]])
    assert picked.pick(dataset(other, "number"), None, None).sha256 != known


def test_splits_are_read_for_a_model_of_the_same_kind_alone() -> None:
    made: Any = SimpleNamespace(
        path="out/m", labels=NAMES, tokenizer=make_tokenizer(), max_length=20, task=tasks.get("multi-label")
    )
    data = Dataset("d", {"test": rows(SETS)}, "f", ["a", "b", "c"], kind="any-of")
    found = Splits(data, made)["test"].labels
    assert np.array_equal(found, targets.as_array(SETS, "any-of", INDEX, 4))
    numbers = Dataset("d", {"test": rows([0.5, 2.0])}, "f", [], kind="number")
    with pytest.raises(
        InputError,
        match="data 'd' have a number as answer, but the model 'out/m' has any of several labels as answer",
    ):
        Splits(numbers, made)
    made.task, made.labels = tasks.get("regression"), ["score"]
    assert Splits(numbers, made)["test"].labels.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_says_no_label_in_the_form_of_its_labels(name: str) -> None:
    task = tasks.get(name)
    labels: Any = {"one-of": ["a", "b"], "any-of": SETS[:2], "number": [0.5, 1.0]}[task.kind]
    array = targets.as_array(labels, task.kind, INDEX, 4)
    without = task.unlabelled(1, 4)
    assert (without.dtype, without.shape[1:]) == (array.dtype, array.shape[1:])
    assert task.known(np.concatenate([array, without])).tolist() == [True, True, False]


def test_the_task_of_a_kind_has_that_kind() -> None:
    assert {kind: tasks.get(name).kind for kind, name in OF_TEXTS.items()} == {
        kind: kind for kind in OF_TEXTS
    }
