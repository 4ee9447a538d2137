"""Folders as people have them: by hand, cloned from a hub, or written by ``save_to_disk``."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from kdcli.data.folders import layout
from kdcli.data.sources import Judging, load
from kdcli.errors import InputError

FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zero", "alpha"])}
)


def split(count: int, tag: str, label: int | None = None) -> datasets.Dataset:
    rows = {
        "text": [f"{tag}{i}" for i in range(count)],
        "label": [i % 2 if label is None else label for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def put(*paths: Path) -> None:
    """A small file for every path; parquet where the name says so."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            split(6, f"file{number}row").to_parquet(str(path))
        else:
            path.write_text("text,label\n" + "".join(f"file{number}row{i},l{i % 2}\n" for i in range(6)))


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "dev.tsv", "test.json"],
        ["Train.CSV", "Val.csv.gz", "TEST.ndjson"],
        [f"data/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")],
        [f"{s}-00000-of-00001-0123456789abcdef.parquet" for s in ("train", "valid", "test")],
        [f"plain_text/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")],
        [f"data/en/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")],
        [f"{s}/0000.parquet" for s in ("train", "validation", "test")],
        [f"default/{s}/0000.parquet" for s in ("train", "validation", "test")],
    ],
)
def test_where_the_splits_are(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "README.md").write_text("x")
    found = layout(tmp_path)
    assert {s: [str(p.relative_to(tmp_path)) for p in group] for s, group in found.files.items()} == {
        s: [name] for s, name in zip(("train", "validation", "test"), names, strict=True)
    }
    assert found.notes == []


def test_a_clone_of_a_hub_in_several_files(tmp_path: Path) -> None:
    put(*(tmp_path / "data" / f"train-0000{i}-of-00003.parquet" for i in range(3)))
    put(tmp_path / "data" / "validation-00000-of-00001.parquet")
    data = load(str(tmp_path))
    assert data.splits["train"].first == [f"file{n}row{i}" for n in range(3) for i in range(6)]
    assert data.label_names == ["alpha", "zero"]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match="of the 3 files of the train split, number 00001 is missing"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.csv", "train.csv.gz"], "two files for the train split: train.csv and train.csv.gz"),
        (["train.csv", "train.tsv"], "two files for the train split"),
        (["train.csv", "dev.csv", "val.csv"], "two files for the validation split"),
        (["train.csv", "train-00000-of-00001.csv"], "two files for the train split"),
        (["train-00000-of-00001.csv", "train-00000-of-00001.parquet"], "two files for the train split"),
        (["en/train.csv", "de/train.csv"], "several data sets: de, en"),
        (["train.csv.bz2"], r"\.bz2 files are not read"),
        (["train.xlsx"], r"\.xlsx files are not read"),
        (["reviews.csv", "notes.md"], "has no train file; it has: notes.md, reviews.csv"),
    ],
)
def test_folders_that_leave_a_choice(tmp_path: Path, names: list[str], message: str) -> None:
    put(*(tmp_path / name for name in names))
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_the_one_file_of_a_folder_is_offered(tmp_path: Path) -> None:
    put(tmp_path / "reviews.csv")
    with pytest.raises(InputError) as caught:
        load(str(tmp_path))
    assert str(caught.value.hint).endswith(f"give the one file: {tmp_path / 'reviews.csv'}")


def test_a_packed_twin_and_files_that_are_no_split(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", tmp_path / "dev_matched.csv", tmp_path / "vocab.csv")
    (tmp_path / "train.csv.zip").write_bytes(b"PK\x03\x04")
    found = layout(tmp_path)
    assert [p.name for group in found.files.values() for p in group] == ["train.csv"]
    assert found.notes == [f"'{tmp_path}': left out: dev_matched.csv"]


def test_saved_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(
        train=split(20, "t"), validation=split(4, "v"), test=split(4, "x", label=-1), extra=split(2, "e")
    ).save_to_disk(tmp_path)
    data = load(str(tmp_path))
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 20, "validation": 4}
    assert data.splits["train"].labels == ["zero", "alpha"] * 10
    assert f"'{tmp_path}': split left out: extra" in data.notes
    assert "the test split has no labels (-1) and is left out" in data.notes


def test_one_saved_data_set_is_as_one_file(tmp_path: Path) -> None:
    split(40, "t").save_to_disk(tmp_path, num_shards=3)
    assert {name: len(rows) for name, rows in load(str(tmp_path)).splits.items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    judged = load(str(tmp_path), judging=Judging())
    assert judged.splits["test"].first == [f"t{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "can't be read"),
        ("[]", "is not a JSON object"),
        ('{"_data_files": []}', "names no data files"),
        ('{"_data_files": [{"filename": "../../etc/passwd"}]}', "names no files of its folder"),
        ('{"_data_files": [{"filename": "none.arrow"}]}', "is not a readable Arrow file"),
        ('{"_indices_data_files": [{"filename": "i.arrow"}]}', "an index of rows"),
    ],
)
def test_a_broken_saved_data_set(tmp_path: Path, state: str, message: str) -> None:
    split(4, "t").save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_saved_data_sets_are_read_from_arrow_alone(tmp_path: Path) -> None:
    split(4, "t").save_to_disk(tmp_path)
    for file in tmp_path.glob("*.arrow"):
        file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not a readable Arrow file"):
        load(str(tmp_path))
