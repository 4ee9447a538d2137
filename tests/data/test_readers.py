from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcli.data import delimited, readers
from kdcli.data.columns import Columns, parse_columns
from kdcli.data.readers import Rows, read
from kdcli.errors import InputError, UsageError

GOOD = Rows(["one, two", "drei\nvier", "fünf"], None, ["x", "y", "x"])


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_with_quotes_ends_of_line_and_byte_order_mark(tmp_path: Path, end: str, mark: str) -> None:
    lines = ["id,text,label", '1,"one, two",x', '2,"drei\nvier", y ', "", "3,fünf,x"]
    found = read(put(tmp_path / "a.csv", mark + end.join(lines) + end), Columns())
    assert found.rows == GOOD
    assert found.place(2) == f"{tmp_path / 'a.csv'}, line 6"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl(tmp_path: Path, end: str, mark: str) -> None:
    assert GOOD.labels is not None
    lines = [
        json.dumps({"text": t, "label": x}, ensure_ascii=False)
        for t, x in zip(GOOD.first, GOOD.labels, strict=True)
    ]
    lines.insert(1, "")
    found = read(put(tmp_path / "a.jsonl", mark + end.join(lines)), Columns())
    assert found.rows == GOOD
    assert list(found.lines) == [1, 3, 4]


def test_a_line_separator_inside_json_is_no_end_of_line(tmp_path: Path) -> None:
    record = '{"text": "a\u2028b", "label": "x"}'
    assert read(put(tmp_path / "a.jsonl", record), Columns()).rows.first == ["a\u2028b"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "other": [1.0, 2.0], "label": [1, 0]}), path)
    found = read(path, Columns())
    assert found.rows == Rows(["a", "b"], None, ["1", "0"])
    assert found.place(1) == f"{path}, row 2"
    assert read(path, Columns({"label": "other"})).rows.labels == ["1", "2"]
    with pytest.raises(InputError, match="not a readable parquet"):
        read(put(path, b"PAR1 nonsense PAR1"), Columns())


def test_pairs_and_other_names(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "text_a,text_b,premise,label,gold\na,b,c,0,yes\n")
    assert read(path, Columns()).rows == Rows(["a"], ["b"], ["0"])
    assert read(path, parse_columns("text=premise, label=gold")).rows == Rows(["c"], None, ["yes"])
    assert read(path, parse_columns("text_a=premise,text_b=text_a")).rows == Rows(["c"], ["a"], ["0"])
    assert read(path, Columns(), labelled=False).rows.labels is None


def test_label_types(tmp_path: Path) -> None:
    lines = "\n".join(f'{{"text": "a", "label": {v}}}' for v in ("7", "true", '" no "'))
    assert read(put(tmp_path / "a.jsonl", lines), Columns()).rows.labels == ["7", "true", "no"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\na,x\nb\n", r"line 3: 1 fields, but the header has 2"),
        ("a.csv", "text,label\na,b,x\n", r"line 2: 3 fields, but the header has 2"),
        ("a.csv", 'text,label\n"a\nb",x\nc, \n', r"line 4: the label in column 'label' is missing"),
        ("a.csv", 'text,label\na,x\n"b,x\nc,x\n', r"line 3: broken CSV"),
        ("a.csv", "text,text,label\na,b,x\n", "2 columns named 'text'"),
        ("a.csv", "txt,label\na,x\n", r"no column 'text': did you mean 'txt'\?"),
        ("a.csv", b"text,label\na,x\n\xffb,x\n", r"line 3: not UTF-8 \(byte 0xff at offset 15\)"),
        ("a.csv", b"\xef\xbb\xbftext,label\n\xffb,x\n", r"line 2: not UTF-8 \(byte 0xff at offset 14\)"),
        ("a.csv", "text,label\na,x\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.csv", "text,label\na,x\n".encode("utf-16")[:-1], "line 2: not UTF-16"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"', "line 2: not JSON"),
        ("a.jsonl", "[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("a.jsonl", '["a"]', "entry 1: str instead of a JSON object"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', "line 2: the label .* is missing"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n\n{"label": "x"}', "line 3: the text .* is missing"),
        ("a.jsonl", '{"text": 5, "label": "x"}', "line 1: the text in column 'text' is int, not text"),
        ("a.jsonl", '{"text": "a", "label": {"x": 1}}', "line 1: the label in column 'label' is an object"),
        ("a.jsonl", '{"text": "a\\ud800", "label": "x"}', "line 1: .* half of a surrogate pair"),
        ("a.txt", "text\tlabel\n", r"not a data file: choose one of: .csv, .json"),
    ],
)
def test_broken_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read(path, Columns())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_endless_text_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 50)
    monkeypatch.setattr(delimited, "MAX_CHARACTERS", 50)
    limit = csv.field_size_limit()
    text = "w" * 51
    content = f"text,label\n{text},x\n" if suffix == ".csv" else json.dumps({"text": text, "label": "x"})
    with pytest.raises(InputError, match=r"line [12]: .*(field larger|51 characters)"):
        read(put(tmp_path / f"a{suffix}", content), Columns())
    assert csv.field_size_limit() == limit


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "dir.csv").mkdir()
    for name, message in (("pipe", "not a regular"), ("dir", "not a regular"), ("none", "does not exist")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / f"{name}.csv", Columns())


def test_escapes_in_a_file_do_not_reach_the_message(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(put(tmp_path / "a.csv", "\x1b[31mtext,label\na,x\n"), Columns())
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "not ROLE=NAME"),
        ("", "not ROLE=NAME"),
        ("text=", "not ROLE=NAME"),
        ("txt=a", r"unknown role 'txt': did you mean 'text'\?"),
        ("label=a,label=b", "'label' twice"),
        ("text=a,text_a=b,text_b=c", "either text=NAME, or both"),
        ("text_a=b", "either text=NAME, or both"),
    ],
)
def test_columns_are_refused(given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_columns(given)


def test_take_keeps_texts_pairs_and_labels_together() -> None:
    rows = Rows(["a", "b", "c"], ["d", "e", "f"], ["x", "y", "z"])
    assert rows.take([2, 0]) == Rows(["c", "a"], ["f", "d"], ["z", "x"])
    assert len(rows.take([])) == 0
