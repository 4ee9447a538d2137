from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from kdcli.data import splits
from kdcli.data.sources import Judging, load
from kdcli.data.tables import Rows
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
