"""Texts part by part: what comes out is what the reader of whole files has, and no more is read than is needed."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kdcli.data import lines, streamed
from kdcli.data.columns import Columns, parse_columns
from kdcli.data.readers import read
from kdcli.data.tables import Located
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError, UsageError

ROWS = [{"text": f'row {i}, "quoted"\nover two lines', "label": str(i % 3)} for i in range(2500)]


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    name = path.name.removesuffix(".gz")
    stream = io.StringIO(newline="")
    if name.endswith(("l", ".ndjson")):
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    elif name.endswith(".json"):
        json.dump(rows, stream)
    else:
        made = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
        made.writeheader()
        made.writerows(rows)
    data = stream.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def joined(parts: Any) -> tuple[list[str], list[str] | None, list[int]]:
    found: list[Located] = list(parts)
    assert all(len(part.rows) <= lines.ROWS for part in found)
    second = [text for part in found for text in part.rows.second or []]
    return (
        [text for part in found for text in part.rows.first],
        second or None,
        [line for part in found for line in part.lines],
    )


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.json", "a.jsonl", "a.ndjson.gz"])
def test_every_form_gives_the_rows_of_the_whole_file(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name)
    whole = read(path, Columns(), labelled=False)
    first, second, places = joined(streamed.of_file(path, Columns(), "one-of"))
    assert (first, second) == (whole.rows.first, None)
    assert places == list(whole.lines)


def test_a_query_and_its_text_are_a_pair_in_every_part(tmp_path: Path) -> None:
    # Only the first query is no number: the columns of a file are chosen once.
    rows = [{"query": "what" if i == 0 else str(i), "passage": f"text {i}"} for i in range(1500)]
    path = written(tmp_path / "a.csv", rows)
    whole = read(path, Columns(), Wanted("number"), labelled=False).rows
    first, second, _ = joined(streamed.of_file(path, Columns(), "number"))
    assert (first, second) == (whole.first, whole.second)
    with pytest.raises(InputError, match="asks for rows to be ranked"):
        list(streamed.of_file(path, parse_columns("query=query,text=passage"), "one-of"))


def test_the_first_part_comes_before_the_last_line_is_read() -> None:
    class Slow:
        asked = 0

        def read1(self, size: int = -1, /) -> bytes:
            self.asked += 1
            return b'{"text": "a"}\n{"te' if self.asked == 1 else b'xt": "b"}\n' if self.asked == 2 else b""

    source = Slow()
    parts = streamed.of_lines(lines.parts(source, "stdin"), "stdin", Columns(), "one-of")
    assert next(parts).rows.first == ["a"]
    assert source.asked == 1
    assert [(part.rows.first, list(part.lines)) for part in parts] == [(["b"], [2])]


def test_lines_keep_their_place() -> None:
    # Blank lines are texts, as the answers are to stand beside the lines; U+2028 ends none.
    data = "\ufeffone\r\n\n two \u2028 three\nlast".encode()
    parts = streamed.of_lines(lines.parts(io.BytesIO(data), "stdin"), "stdin", Columns(), "one-of")
    assert joined(parts)[0] == ["one", "", " two \u2028 three", "last"]
    assert list(streamed.of_lines(lines.parts(io.BytesIO(b""), "stdin"), "stdin", Columns(), "one-of")) == []
    with pytest.raises(UsageError, match="does not apply to stdin"):
        streamed.of_lines([lines.LineBlock(1, ["a"])], "stdin", parse_columns("text=a"), "one-of")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: the text in column 'text' is int"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.csv", b"text,label\na,b\nc\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", b'text\na\n"b\n', "line 3: broken CSV"),
        ("a.csv", b"text\na\n\xff\n", "line 3: not UTF-8"),
        ("a.csv", b"body\na\n", "no column 'text'"),
        ("a.txt", b"a\n\xff\n", "line 2: not UTF-8"),
        ("a.xlsx", b"PK", "are not read"),
        ("a.csv.gz", b"no gzip", "can't be read"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(streamed.of_file(tmp_path / name, Columns(), "one-of"))


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"text,label\n"), ("a.jsonl", b""), ("a.txt", b"")])
def test_a_file_without_rows_has_none(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(streamed.of_file(tmp_path / name, Columns(), "one-of")) == []


def test_lists_are_texts_or_pairs() -> None:
    assert joined(streamed.of_texts(["a", "b"]))[0] == ["a", "b"]
    assert joined(streamed.of_texts(iter([("a", "b")] * 1500)))[1] == ["b"] * 1500
    with pytest.raises(InputError, match="entry 2: the text in column 'text' is int"):
        list(streamed.of_texts(["a", 3]))  # type: ignore[list-item]
    with pytest.raises(InputError, match="entry 2: not a pair"):
        list(streamed.of_texts([("a", "b"), "ab"]))
