from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kdcli.data import splits
from kdcli.data.sources import Judging, load
from kdcli.data.tables import Label, Located, Rows
from kdcli.errors import InputError
from kdcli.tasks.task import Kind
from tests.data.test_sources import numbered, write


def normal(rows: Rows) -> list[str]:
    return [" ".join(text.casefold().split()) for text in rows.first]


def log_rows(seed: int = 0) -> list[tuple[str, str]]:
    """As in a chat log: 12 labels of 12 texts, most of them once, some often, in several spellings."""
    rng = random.Random(seed)
    rows = []
    for i in range(144):
        for _ in range(1 + int(rng.expovariate(0.5))):
            text = f"{rng.choice(['say', 'Say', 'SAY'])} {' ' * rng.randint(0, 2)}number {i}"
            rows.append((text, f"label{i % 12}"))
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_equal_texts_stay_in_one_split(tmp_path: Path, seed: int) -> None:
    rows = log_rows(seed)
    data = load(str(write(tmp_path / "logs.csv", rows)), seed=seed)
    texts = {name: set(normal(part)) for name, part in data.splits.items()}
    assert sum(len(part) for part in data.splits.values()) == len(rows)
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    # A tenth of the texts to one; the rows follow with the noise of how often each was said.
    assert len(texts["test"]) in (13, 14, 15)
    assert set(Counter(data.splits["train"].labels)) == {f"label{i}" for i in range(12)}
    assert any("equal texts are in one split" in note for note in data.notes)
    assert load(str(tmp_path / "logs.csv"), seed=seed) == data


def test_a_validation_split_taken_from_train_shares_no_text_with_it(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", log_rows())
    data = load(str(tmp_path))
    assert not set(normal(data.splits["train"])) & set(normal(data.splits["validation"]))


def test_pairs_are_equal_as_pairs() -> None:
    rows = Rows(["a", "a", "A "], ["b", "c", " B"], ["x", "x", "x"])
    one, two, three = splits.keys(rows)
    assert one == three != two
    assert splits.keys(Rows(["ab"], ["c"])) != splits.keys(Rows(["a"], ["bc"]))


def test_a_text_that_fills_the_file_stays_in_train(tmp_path: Path) -> None:
    rows = numbered(100) + [("ok", "a")] * 40
    for seed in range(5):
        data = load(str(write(tmp_path / "all.csv", rows)), seed=seed)
        assert "ok" not in data.splits["test"].first + data.splits["validation"].first


def test_a_label_that_only_stands_beside_another_stays_in_train(tmp_path: Path) -> None:
    rows = [("same words", "a"), ("same words", "rare"), *numbered(60)]
    for seed in range(20):
        data = load(str(write(tmp_path / "all.csv", rows)), seed=seed)
        assert "rare" in (data.splits["train"].labels or [])


def test_the_split_of_distinct_texts_is_what_it_was() -> None:
    """Models in use were measured on it: a later kdcli must hold out the same rows."""
    labels = ["a", "b", "c"] * 10
    keys = splits.keys(Rows([f"t{i}" for i in range(30)]))
    assert splits.roles(labels, 3, keys).tolist() == EXPECTED


EXPECTED = [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 1, 1, 0, 2, 0, 0, 0, 0, 0]


def test_overlap_of_given_splits_is_counted_and_said(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", numbered(20))
    write(tmp_path / "validation.csv", [*numbered(3, tag="T"), ("v0", "a"), ("v1", "b")])
    write(tmp_path / "test.csv", [("v0", "a"), ("t5 ", "b"), ("x", "a"), ("y", "b")])
    for judging in (None, Judging()):
        data = load(str(tmp_path), judging=judging)
        ((code, message),) = data.warnings
        assert code == "split-overlap"
        assert "3 of the 5 rows of validation are in train too" in message
        assert "1 of the 4 rows of test are in train too" in message
        assert "1 of the 4 rows of test are in validation too" in message
        assert message in data.notes
    write(tmp_path / "test.csv", numbered(4, tag="new"))
    write(tmp_path / "validation.csv", numbered(4, tag="other"))
    assert load(str(tmp_path)).warnings == []


def test_one_text_with_two_labels_is_said(tmp_path: Path) -> None:
    rows = [*numbered(40), ("T0", "b"), ("t2", "b"), ("t2", "b")]
    warnings = load(str(write(tmp_path / "all.csv", rows))).warnings
    assert warnings == [("conflicting-labels", "2 texts stand in the data with different labels")]
    write(tmp_path / "d" / "train.csv", numbered(20))
    write(tmp_path / "d" / "test.csv", [("t0", "b"), ("x", "a")])
    assert "conflicting-labels" in dict(load(str(tmp_path / "d")).warnings)


def tags(count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Sets of 6 labels of which each is half as frequent as the one before; the last stands beside the first alone."""
    rng = np.random.default_rng(seed)
    found = [tuple(x for j, x in enumerate("abcde") if rng.random() < 0.5 ** (j + 1)) for _ in range(count)]
    return [("a", "f"), *found[1:]]


def located(labels: Sequence[Label], kind: Kind, queries: list[str] | None = None) -> Located:
    rows = Rows([f"t{i}" for i in range(len(labels))], None, labels, queries)
    return Located(rows, "a.csv", range(len(labels)), kind=kind)


@pytest.mark.parametrize("seed", range(5))
def test_sets_of_labels_are_split_by_the_rarest_label_of_a_row(seed: int) -> None:
    labels = tags(600)
    part = located(labels, "any-of")
    role = splits.roles_of(part, seed, splits.keys(part.rows))
    rarest = np.array([max(names, default="-") for names in labels])  # f is the rarest, then e, d, c, b, a
    for name in "-abcde":
        here = role[rarest == name]
        # The position modulo ten is the role, so a share is exact to one row but for where the stratum begins.
        assert abs((here == 1).sum() - len(here) / 10) <= 1
        assert abs((here == 2).sum() - len(here) / 10) <= 1
    assert set(splits.names(x for x, r in zip(labels, role, strict=True) if r == 0)) == set("abcdef")


def test_a_label_that_is_never_the_rarest_of_its_rows_stays_in_train() -> None:
    """c stands only beside one of 30 rarer labels, each of which has a place in train of its own accord."""
    labels: list[Label] = (
        [("x",)] * 60 + [(f"r{i}", "y") for i in range(2) for _ in range(2)] + [("y", "z")] * 3
    )
    part = located(labels, "any-of")
    for seed in range(30):
        role = splits.roles_of(part, seed, splits.keys(part.rows))
        learned = set(splits.names(x for x, r in zip(labels, role, strict=True) if r == 0))
        assert learned == set(splits.names(labels))


def test_numbers_are_split_by_the_tenth_they_lie_in() -> None:
    values = np.random.default_rng(0).normal(size=1000) ** 3
    part = located(values.tolist(), "number")
    role = splits.roles_of(part, 0, splits.keys(part.rows))
    tenth = np.argsort(np.argsort(values)) // 100
    for i in range(10):
        assert np.abs(np.bincount(role[tenth == i], minlength=3) - [80, 10, 10]).max() <= 1
    constant = located([1.0] * 100, "number")
    assert np.bincount(splits.roles_of(constant, 0, splits.keys(constant.rows))).tolist() == [80, 10, 10]


@pytest.mark.parametrize("seed", range(5))
def test_the_rows_of_a_query_are_in_one_split(seed: int) -> None:
    rng = random.Random(seed)
    queries = [rng.choice(["who is {}", "Who  is {}"]).format(rng.randrange(40)) for _ in range(400)]
    part = located([float(i % 3) for i in range(400)], "number", queries)
    found = splits.in_three(part, seed, splits.keys(part.rows))
    sides = [{q.casefold().split()[-1] for q in found[name].rows.queries or []} for name in splits.ORDER]
    assert [len(side) for side in sides] == [32, 4, 4]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_one_file_of_few_queries_is_judged_and_not_split(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("query,text,label\n" + "".join(f"only one,passage {i},{i / 2}\n" for i in range(20)))
    with pytest.raises(
        InputError, match=r"rows of 1 queries; those of one query stay in one split, which needs 10"
    ):
        load(str(path))
    for judging in (Judging(), Judging(as_made=True)):
        data = load(str(path), judging=judging)
        assert len(data.splits["test"]) == 20
    path.rename(tmp_path / "train.csv")
    with pytest.raises(InputError, match=r"rows of 1 queries"):
        load(str(tmp_path))
    (tmp_path / "validation.csv").write_text("query,text,label\nanother,p,0.5\nanother,q,1\n")
    assert load(str(tmp_path)).splits["train"].second is not None


def test_equal_texts_of_different_queries_are_different_rows() -> None:
    one = Rows(["a", "a"], None, [0.5, 1.0], ["1", "2"])
    assert len(set(splits.keys(one))) == 2
    assert splits.conflicts(splits.keys(one), one.labels or []) == []
    two = Rows(["a", "A "], None, [("x",), ("x", "y")])
    assert splits.conflicts(splits.keys(two), two.labels or []) != []
