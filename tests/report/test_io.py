from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import InputError
from kdcli.measure import comparison
from kdcli.report import io
from kdcli.report.schema import Method
from tests.report.reports import V1, bare, full


@pytest.mark.parametrize("file", sorted(V1.glob("*.json")), ids=lambda path: path.name)
def test_reports_of_earlier_releases_keep_loading(file: Path) -> None:
    """Never change these files: a report that does not load any more is a broken promise."""
    assert io.read(file).schema_version == 2


def test_version_1_reads_as_version_2() -> None:
    old = json.loads((V1 / "prune.json").read_text(encoding="utf-8"))
    report = full()
    assert report.after.quality is not None
    assert report.after.quality.primary == report.delta.primary == "accuracy"
    found = {name: one.model_dump(mode="json") for name, one in report.after.quality.metrics.items()}
    assert found == old["after"]["quality"]
    assert report.delta.differences == {"accuracy": old["delta"]["accuracy"]}
    assert [(one.metric, one.value) for one in report.lineage] == [
        ("accuracy", one["accuracy"]) for one in old["lineage"]
    ]
    assert (bare().delta.primary, bare().delta.main) == (None, None)


def test_a_lineage_of_version_1_still_compares() -> None:
    stored = json.loads((V1 / "prune.json").read_text(encoding="utf-8"))["lineage"]
    stored[0]["params"]["measurement"]["quality"]["rows_sha256"] = "r"
    first, *rest = io.lineage(stored)
    assert [(one.metric, one.value) for one in rest] == [("accuracy", one["accuracy"]) for one in stored[1:]]
    recorded = io.recorded(first)
    assert recorded is not None
    now = full().after
    assert now.quality is not None
    now.quality.rows_sha256 = "r"
    found = comparison.compare(comparison.from_record(recorded, now), now)
    assert found.main == pytest.approx(0.80577778 - 0.956)
    assert set(found.differences) == {"accuracy", "macro_f1", "ece"}
    assert io.recorded(rest[0]) is None


def test_an_interval_of_version_1_keeps_its_place(tmp_path: Path) -> None:
    old = json.loads((V1 / "prune.json").read_text(encoding="utf-8"))
    old["delta"] |= {"accuracy_ci95": [-0.2, -0.1], "lost": 9, "won": 1}
    (tmp_path / "report.json").write_text(json.dumps(old))
    found = io.read(tmp_path).delta
    assert (found.ci95, found.lost, found.won) == ((-0.2, -0.1), 9, 1)


DOCS = Path(io.__file__).parents[2] / "docs" / "report.md"


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_the_queries_of_the_documentation_answer(tmp_path: Path) -> None:
    io.write(full(), tmp_path)
    commands = re.findall(r"^jq .*$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    said = [
        subprocess.run(one, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for one in commands
    ]
    assert [one.split()[0] for one in said] == ["0.8057777777777778", "-0.15022222222222215", "accuracy"]


def test_old_values_arrive_where_they_belong() -> None:
    report = full()
    assert report.stage == "prune"
    assert report.after.quality is not None
    assert report.after.quality.accuracy.n == 4500
    assert report.method is not None
    assert report.method.layers[1]["heads_after"] == 5
    assert [gate.passed for gate in report.gates] == [True, False, False]
    assert [entry.stage for entry in report.lineage] == ["input", "distill", "prune"]


@pytest.mark.parametrize("report", [full(), bare()], ids=["full", "bare"])
def test_what_is_written_is_read_back(tmp_path: Path, report: Any) -> None:
    path = io.write(report, tmp_path)
    assert path == tmp_path / "report.json"
    assert io.read(tmp_path) == io.read(path) == report
    assert os.listdir(tmp_path) == ["report.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_text_is_stable_in_declaration_order_and_ends_with_a_newline() -> None:
    text = io.dumps(full())
    assert text == io.dumps(io.Report.model_validate(json.loads(text)))
    assert list(json.loads(text)) == list(io.Report.model_fields)
    assert text.startswith('{\n  "schema_version": 2,\n')
    assert text.endswith("}\n")


def test_nan_in_free_form_detail_becomes_null() -> None:
    method = Method(
        name="m", params={"a": math.nan}, detail={"b": [1.0, {"c": math.inf}]}, layers=[{"d": -math.inf}]
    )
    written = json.loads(io.dumps(full().model_copy(update={"method": method})))["method"]
    assert written == {
        "name": "m",
        "params": {"a": None},
        "detail": {"b": [1.0, {"c": None}]},
        "layers": [{"d": None}],
    }


def test_a_file_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    report = full().model_copy(update={"command": ["kdcli", os.fsdecode(b"caf\xe9"), "naïve"]})
    io.write(report, tmp_path)
    assert io.read(tmp_path).command == report.command
    assert "naïve" in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_report_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io.write(full(), tmp_path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        io.write(bare(), tmp_path)
    assert os.listdir(tmp_path) == ["report.json"]
    assert io.read(tmp_path) == full()


def test_a_directory_without_a_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no report\.json"):
        io.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"[]", "not a kdcli report"),
        (b'{"kind": "other"}', "not a kdcli report"),
        (b'{"kind": "kdcli.report"}', "schema version None"),
        (b'{"kind": "kdcli.report", "schema_version": 3}', "schema version 3"),
        (b'{"kind": "kdcli.report", "schema_version": true}', "schema version True"),
        (b'{"kind": "kdcli.report", "schema_version": [2]}', "schema version"),
        (b'{"kind": "kdcli.report", "schema_version": 1}', "complete: Field required"),
        (b'{"kind": "kdcli.report", "schema_version": 2}', "complete: Field required"),
        (b'{"kind": "kdcli.report", "schema_version": 1, "lineage": [3], "after": 1}', "complete: Field"),
    ],
)
def test_broken_reports_are_one_line_that_names_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        io.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    content = json.loads(io.dumps(full()))
    content["after"]["quality"]["accuracy"]["value"] = "NaN"
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"after\.quality\.accuracy\.value"):
        io.read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(InputError, match="not a regular file"):
        io.read(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert io.sha256_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_the_json_schema_covers_the_top_level_and_forbids_more() -> None:
    text = io.schema_json()
    schema = json.loads(text)
    assert text == json.dumps(schema, indent=2, sort_keys=True) + "\n"
    assert set(schema["properties"]) == set(io.Report.model_fields)
    assert schema["additionalProperties"] is False
