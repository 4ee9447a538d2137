"""Files as other programs write them: each must give the rows that went in, or a refusal in words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcli.data import files
from kdcli.data.columns import Columns, parse_columns
from kdcli.data.readers import read
from kdcli.data.tables import Rows
from kdcli.errors import InputError

TEXTS = [
    "plain words",
    "a comma, and another, here",
    'he said "no" to it',
    '"quoted from end to end"',
    "semi;colon | bar",
    "fünf Ärzte „sagten“ ja",
    "it's",
    "NA",
    "null",
    "None",
    "",
]
LABELS = ["good", "bad"] * 5 + ["good"]
ROWS = Rows(TEXTS, None, LABELS)


def written(separator: str, quoting: int = csv.QUOTE_MINIMAL, end: str = "\r\n") -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerow(["text", "label"])
    writer.writerows(zip(TEXTS, LABELS, strict=True))
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_every_separator_as_spreadsheets_write_it(
    tmp_path: Path, separator: str, quoting: int, encoding: str
) -> None:
    content = written(separator, quoting).encode(encoding)
    for name in ("a.csv", "A.CSV", "a.tsv"):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, Columns()).rows == ROWS


def test_the_line_for_spreadsheets_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\r\n" + written(";"), encoding="utf-8", newline="")
    found = read(tmp_path / "a.csv", Columns())
    assert found.rows == ROWS
    assert list(found.lines)[:2] == [3, 4]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_tab_separated_text_whose_quotes_are_part_of_it(tmp_path: Path, name: str) -> None:
    """GLUE writes no quoting at all; read as quoted, the rows from an opening to the next closing quote are one."""
    texts = ['"opens and never closes', "between", 'closes here"', '"both"', 'say "hi"', "x"]
    content = "text\tlabel\n" + "".join(f"{t}\tgood\n" for t in texts)
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name, Columns()).rows.first == texts


def test_quoted_tabs_and_line_ends_in_tab_separated_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one\ttwo\t\nthree"\tgood\nfour\tbad\n')
    found = read(tmp_path / "a.tsv", Columns())
    assert found.rows.first == ["one\ttwo\t\nthree", "four"]
    assert list(found.lines) == [2, 4]


def test_spreadsheets_enclose_commas_between_tabs_too(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one, two"\tgood\nthree\tbad\n')
    assert read(tmp_path / "a.tsv", Columns()).rows.first == ["one, two", "three"]


def test_random_texts_come_back_whatever_the_separator(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabet = ["a", "b", " ", ",", ";", "|", '"', "'", "\t", "\n", "é"]
    for number in range(60):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(8)]
        for separator in ",;\t|":
            stream = io.StringIO(newline="")
            writer = csv.writer(stream, delimiter=separator)
            writer.writerow(["label", "id", "text"])
            writer.writerows(("x", i, t) for i, t in enumerate(texts))
            path = tmp_path / f"{number}.csv"
            path.write_text(stream.getvalue(), encoding="utf-8", newline="")
            assert read(path, Columns()).rows.first == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text;label\na;b;x\n", "line 2: 3 fields, but the header has 2"),
        ("text\tlabel\na\tx\nb\n", "line 3: 1 fields, but the header has 2"),
        ("sentence;label\na, b;x\nc;y\n", r"has no column 'text': choose one of: label, sentence"),
    ],
)
def test_rows_must_fit_the_header(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv", Columns())


def test_a_line_of_blanks_is_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\n  \nb,y\n   ")
    found = read(tmp_path / "a.csv", Columns())
    assert found.rows.first == ["a", "b"]
    assert list(found.lines) == [2, 4]
    (tmp_path / "a.csv").write_text("text,label\na,x\nb\n")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.csv", Columns())
    assert "quotes" not in str(caught.value.hint)  # nothing is to be quoted where a field is missing


def test_a_file_that_begins_with_a_row(tmp_path: Path) -> None:
    """Its first text must not be offered as the name of the column."""
    (tmp_path / "a.csv").write_text("this film was really very good,good\nand this one was quite bad,bad\n")
    with pytest.raises(InputError, match="first line seems to be a row") as caught:
        read(tmp_path / "a.csv", Columns())
    assert "--columns" not in str(caught.value.hint)


def test_one_file_with_the_rows_of_several_splits(tmp_path: Path) -> None:
    row = {"text": "a", "label": "x"}
    (tmp_path / "a.json").write_text(json.dumps({"train": [row, row], "test": [row]}))
    with pytest.raises(InputError, match="several lists of rows: train, test"):
        read(tmp_path / "a.json", Columns())


OBJECTS = [{"text": t, "label": x} for t, x in zip(TEXTS, LABELS, strict=True)]
JSON: dict[str, Callable[[], str]] = {
    "lines": lambda: "\n".join(json.dumps(x) for x in OBJECTS),
    "array": lambda: json.dumps(OBJECTS),
    "pretty array": lambda: "\n" + json.dumps(OBJECTS, indent=2),
    "pretty objects": lambda: "\n".join(json.dumps(x, indent=2) for x in OBJECTS),
    "one after the other": lambda: "{\n" + " ".join(json.dumps(x) for x in OBJECTS)[1:],
    "under a key": lambda: json.dumps({"version": 1, "data": OBJECTS}),
    "pretty under a key": lambda: json.dumps({"version": 1, "data": OBJECTS}, indent=1),
    "names apart from values": lambda: json.dumps(
        {"columns": ["text", "label"], "index": [0], "data": [list(x.values()) for x in OBJECTS]}
    ),
    "columns": lambda: json.dumps({"text": TEXTS, "label": LABELS}),
    "columns of pandas": lambda: json.dumps(
        {k: {str(i): x[k] for i, x in enumerate(OBJECTS)} for k in ("text", "label")}
    ),
}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".JSON"])
@pytest.mark.parametrize("layout", list(JSON))
def test_json_in_every_layout(tmp_path: Path, layout: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text(JSON[layout](), encoding="utf-8")
    assert read(path, Columns()).rows == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a", "label": "x"},\n{"text": "b"', "line 2: not JSON"),
        ('{"text": "a",\n"label": "x"}\n{"text": \n', "line 4: not JSON"),
        ('{\n"text": "a"}\n[1]', "line 3: list instead of a JSON object"),
        ('[{"text": "a", "label": "x"}, {"text": "b"}]', "entry 2: the label in column 'label' is missing"),
        ('{"text": "a", "label": null}\n' * 3 + '{"text": "a", "label": "x"}', "missing, as in 2 further"),
        (
            '{"text": null, "label": "x"}\n' * 2,
            "line 1: the text in column 'text' is missing, as in 1 further",
        ),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json", Columns())


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".ndjson"])
def test_gzip(tmp_path: Path, ending: str) -> None:
    content = written("\t" if ending == ".tsv" else ",") if "sv" in ending else JSON["lines"]()
    path = tmp_path / f"a{ending}.gz"
    path.write_bytes(gzip.compress(content.encode()))
    assert read(path, Columns()).rows == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="can't be unpacked"):
        read(path, Columns())
    path.write_text("no gzip")
    with pytest.raises(InputError, match="can't be unpacked"):
        read(path, Columns())


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SUSPICIOUS", 1 << 20)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b" " * (64 << 20)))
    with pytest.raises(InputError, match=r"holds more than \d+ MiB") as caught:
        read(path, Columns())
    assert "unpack it yourself" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv.bz2", b"x", r"\.bz2 files are not read", "unpack it first"),
        ("a.csv.zst", b"x", r"\.zst files are not read", "unpack it first"),
        ("a.zip", b"x", r"\.zip files are not read", "unpack it first"),
        ("a.XLSX", b"x", r"\.xlsx files are not read", "save the sheet as CSV"),
        ("a.arrow", b"x", r"\.arrow files are not read", "save_to_disk"),
        ("a.pkl", b"x", r"\.pkl files are not read", "never opened"),
        ("a.parquet.gz", b"x", "is not a data file", "gunzip"),
        ("a.csv", gzip.compress(b"text", mtime=0), "packed by gzip: name it with .gz", ""),
        ("a.csv", b"PK\x03\x04xx", "is a zip file", ""),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS", "git lfs pull"),
    ],
)
def test_what_is_not_read_is_refused_with_a_way_to_go_on(
    tmp_path: Path, name: str, content: bytes, message: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name, Columns())
    assert hint in (caught.value.hint or "")


def test_a_parquet_file_knows_the_names_of_its_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zero", "alpha"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    found = read(tmp_path / "a.parquet", Columns())
    assert found.rows == Rows(["a", "b"], None, ["alpha", "zero"])
    assert found.without_label == 1
    numbers = read(tmp_path / "a.parquet", parse_columns("label=label:ids"))
    assert numbers.rows.labels == ["1", "0"]


def test_categories_of_pandas_and_class_numbers_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": labels}), path)
    assert read(path, Columns()).rows.labels == ["x", "y", "x"]
    info = {"info": {"features": {"label": {"names": ["p", "q"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": ["a"], "label": [2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    with pytest.raises(InputError, match="row 1: column 'label' has 2, but the file names 2 classes"):
        read(path, Columns())


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'{"info": 3}', b'{"info": {"features": [1]}}'])
def test_metadata_of_another_kind_is_passed_over(tmp_path: Path, metadata: bytes) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a", "b"], "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), path)
    assert read(path, Columns()).rows.labels == ["1", "0"]
