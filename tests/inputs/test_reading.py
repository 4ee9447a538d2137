"""What is told of texts, and that a stage measures and ships what the tokenizer of its input makes of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from kdcli.data.readers import Rows
from kdcli.errors import InputError
from kdcli.export import graph
from kdcli.inputs import reading, text
from kdcli.models.checkpoint import load
from kdcli.progress import Progress
from kdcli.report.schema import Report
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def changed(place: Path, **settings: Any) -> Path:
    """A BERT whose tokenizer.json splits at white space alone, in a class that is made anew from the vocabulary."""
    tiny.saved(place)
    backend = Tokenizer.from_file(str(place / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Sequence([normalizers.Replace("film", "plot"), normalizers.Lowercase()])
    backend.save(str(place / "tokenizer.json"))
    file = place / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(content), encoding="utf-8")
    return place


def stage(model: Path, data: Path, out: Path, options: Any, name: str) -> tuple[Report, list[str]]:
    progress = Notes()
    request = Request(
        stage=name,  # type: ignore[arg-type]
        model=str(model),
        options=options,
        common=Common(out=out, data=str(data)),
        argv=("kdcli",),
    )
    made = life.run(request, progress)
    assert made is not None
    return made.report, progress.lines


def alone(directory: Path, rows: list[str]) -> np.ndarray:
    """Answers by onnxruntime and the tokenizers library, as somebody without kdcli has them."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(40)
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    found = []
    for row in rows:
        e = backend.encode(row)
        given = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        found.append(session.run(None, {n: np.array([given[n]], dtype=np.int64) for n in names})[0][0])
    return np.stack(found)


@pytest.fixture(scope="module")
def half(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Report, list[str], list[str], list[str]]:
    """A model with its own tokenizer and pairs without segments, quantised to half on rows of all lengths."""
    base = tmp_path_factory.mktemp("texts")
    model = changed(base / "in", model_input_names=["input_ids", "attention_mask"])
    rng, data = random.Random(0), base / "data"
    data.mkdir()
    rows = [tiny.sentence(rng, i % 2 == 1) for i in range(24)]
    rows[3], rows[4] = (
        " ".join(["film"] * 37),
        " ".join(["good plot"] * 60),
    )  # a token less than the limit; above it
    labels = [tiny.LABELS[i % 2] for i in range(24)]
    lines = [
        json.dumps({"text_a": a, "text_b": "it.was", "label": label})
        for a, label in zip(rows, labels, strict=True)
    ]
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report, notes = stage(model, data, base / "out", QuantizeOptions(scheme="fp16"), "quantize")
    return model, base / "out", report, notes, rows, labels


def test_what_ships_splits_as_what_came_in_and_the_graph_asks_for_no_more(half: Any) -> None:
    model, out, report, _, rows, labels = half
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    plain = AutoTokenizer.from_pretrained(out)
    assert set(plain("a", "b")) == {"input_ids", "attention_mask"}
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert {one.name for one in session.get_inputs()} == {"input_ids", "attention_mask"}
    found = []
    for row in rows:
        given = plain(row, "it.was", truncation=True, max_length=40, return_tensors="np")
        found.append(session.run(None, {name: value.astype(np.int64) for name, value in given.items()})[0][0])
    right = np.mean([tiny.LABELS[i] == label for i, label in zip(np.argmax(found, 1), labels, strict=True)])
    assert report.after.quality is not None
    assert report.after.quality.accuracy.value == right


def test_rows_at_the_limit_work_and_cut_ones_are_counted(half: Any) -> None:
    _, _, report, notes, _, _ = half
    assert report.parity is not None
    assert max(tokens for _, tokens in report.parity.shapes) == 40
    assert "2 of 24 rows of test are longer than 40 tokens: they are cut there" in notes
    cut = [one.message for one in report.warnings if one.code == "rows-cut"]
    assert len(cut) == 1
    assert "2 of 24 rows of test (8.3%)" in cut[0]


def test_a_cut_vocabulary_splits_as_the_file_too(tmp_path: Path, data_dir: Path) -> None:
    """Of what stays, that is: rows of kept words are split as by the whole vocabulary."""
    model, out = changed(tmp_path / "in"), tmp_path / "out"
    report, _ = stage(model, data_dir, out, PruneOptions(structure="vocab"), "prune")
    assert report.method is not None
    rows = ["film good.", "the film WAS good"]
    whole, left = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (model, out))
    for row in rows:
        assert left.encode(row).tokens == whole.encode(row).tokens
        assert AutoTokenizer.from_pretrained(out)(row)["input_ids"] == left.encode(row).ids
    assert np.isfinite(alone(out, rows)).all()


def test_parity_never_pads_past_the_positions() -> None:
    rows = text.Encoded(np.full(45, 5, np.int32), None, np.array([0, 5, 45]), None)
    widths = [batch["input_ids"].shape[1] for batch in graph.parity_batches(rows, 0, 40)]
    assert widths == [5, 40, 40, 40, 40]
    widths = [batch["input_ids"].shape[1] for batch in graph.parity_batches(rows, 0, 60)]
    assert max(widths) == 45


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["good film"] * 40, False),
        (["good film was the very plot"] * 39 + ["strange film"], False),
        (["good film"] * 39 + ["strange words"], True),  # a row that holds nothing else
        (["good film strange"] * 40, True),
    ],
)
def test_texts_that_the_vocabulary_does_not_know_are_told(
    tmp_path: Path, rows: list[str], said: bool
) -> None:
    made = load(tiny.saved(tmp_path))
    encoded = text.encode(Rows(rows), made.tokenizer, made.max_length, None)
    found = reading.told(made, {"test": encoded})
    assert [one.code for one in found] == (["unknown-tokens"] if said else [])


def test_the_share_of_unknown_tokens_counts_no_special_ones(tmp_path: Path) -> None:
    made = load(tiny.saved(tmp_path))
    rows = Rows(["good strange", "strange strange", "", "film"])
    encoded = text.encode(rows, made.tokenizer, made.max_length, None)
    assert reading.unknown(encoded, made.tokenizer) == (3 / 5, 1)


def test_files_that_contradict_each_other_are_told_where_rows_differ(tmp_path: Path) -> None:
    path = tiny.saved(tmp_path)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.enable_truncation(3)
    backend.save(str(path / "tokenizer.json"))
    file = path / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"do_lower_case": True}
    file.write_text(json.dumps(content), encoding="utf-8")
    made = load(path)

    def codes(rows: list[str]) -> list[str]:
        given = Rows(rows)
        encoded = text.encode(given, made.tokenizer, made.max_length, None)
        return [one.code for one in reading.check_reading(made, given, encoded, "test")]

    assert codes(["a"]) == []
    assert codes(["Film"]) == ["tokenizer-settings"]
    assert codes(["film film film"]) == ["stored-truncation"]


def test_rows_that_are_split_in_another_way_than_the_file_says_are_refused(tmp_path: Path) -> None:
    made = load(changed(tmp_path / "in"))
    rows = Rows(["good film", "the plot"])
    encoded = text.encode(rows, made.tokenizer, made.max_length, None)
    assert reading.check_reading(made, rows, encoded, "test") == []
    reading.check_written(made, made, rows, encoded)
    ranked = replace(rows, queries=["a", "b"])  # which are no tokens
    reading.check_written(made, made, ranked, text.encode(ranked, made.tokenizer, made.max_length, None))
    other = load(tiny.saved(tmp_path / "other"))
    wrong = text.encode(rows, other.tokenizer, made.max_length, None)
    with pytest.raises(InputError, match="1 of 2 rows of test are not split as"):
        reading.check_reading(made, rows, wrong, "test")
    with pytest.raises(InputError, match="does not split texts as the one in"):
        reading.check_written(made, other, rows, encoded)
