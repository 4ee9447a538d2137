"""inspect, list, run, report and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcli import families, registry, tasks
from kdcli.cli.list import LISTS
from kdcli.data.sources import ALIASES
from kdcli.models.aliases import MODELS, SMALL_STUDENTS
from kdcli.report import io
from kdcli.stages.distill.options import STRATEGIES, STUDENT_PRESETS
from kdcli.stages.prune.options import STRUCTURES
from kdcli.stages.quantize.options import SCHEMES
from tests.cli import fakes
from tests.cli.conftest import Call
from tests.cli.fakes import Recorder


def test_inspect_shows_facts_and_hides_nothing_in_control_characters(call: Call, recorder: Recorder) -> None:
    result = call("inspect", "model", "--offline")
    assert result.out.splitlines() == [
        "model: model",
        "sizes:",
        "  hidden_size: 1,024",
        "labels: a\\x1b[31m, b",
    ]
    assert recorder.calls == [("model", True)]
    assert json.loads(call("inspect", "-", "--json", stdin="out/x\n").out)["model"] == "out/x"


def test_list_shows_every_name(call: Call) -> None:
    expected = {
        "models": set(MODELS),
        "students": {*STUDENT_PRESETS, *SMALL_STUDENTS},
        "data": set(ALIASES),
        "methods": {name for folder in registry.FOLDERS for name in registry.names(folder)},
        "families": set(families.every()),
        "schemes": set(SCHEMES),
        "strategies": set(STRATEGIES),
        "structures": set(STRUCTURES),
        "tasks": set(tasks.names()),
    }
    assert set(expected) == set(LISTS)
    for what, names in expected.items():
        rows = json.loads(call("list", what, "--json").out)
        assert {row["name"] for row in rows} == names
        text = call("list", what).out
        assert len(text.splitlines()) == len(rows)
        assert all(name in text for name in names)
    for row in json.loads(call("list", "tasks", "--json").out):
        task = tasks.get(row["name"])
        assert row["metrics"][0] == task.primary
        assert set(row["metrics"]) == set(task.metrics)
    assert MODELS["minilm"].revision in call("list", "models", "--json").out


def test_run_hands_the_recipe_over(call: Call, recorder: Recorder) -> None:
    result = call("run", "recipe.yaml", "-o", "out", "--force")
    assert (result.code, result.out) == (0, "out/2-prune\n")
    assert json.loads(call("run", "recipe.yaml", "--json").out)["stage"] == "prune"
    dry = call("run", "recipe.yaml", "--dry-run", "--json")
    assert json.loads(dry.out) == {"kind": "kdcli.plan", "stage": "recipe"}
    recipe = Path("recipe.yaml")
    assert recorder.calls == [
        (recipe, Path("out"), True, False),
        (recipe, None, False, False),
        (recipe, None, False, True),
    ]


def test_report_as_markdown_html_and_json(call: Call) -> None:
    Path("out").mkdir()
    io.write(fakes.report(), Path("out"))
    assert "accuracy" in call("report", "out").out
    result = call("report", "out/report.json", "--html", "pages/report.html")
    assert (result.code, result.out) == (0, "pages/report.html\n")
    assert "<html" in Path("pages/report.html").read_text(encoding="utf-8")
    assert call("report", "out", "--json").out == Path("out/report.json").read_text(encoding="utf-8")


def test_report_of_nothing_is_bad_input(call: Call) -> None:
    result = call("report", "model")
    assert (result.code, result.out) == (3, "")
    Path("full").write_text("")
    Path("out").mkdir()
    io.write(fakes.report(), Path("out"))
    assert call("report", "out", "--html", "full/report.html").code == 6


def test_doctor_describes_the_machine(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "stages").mkdir(parents=True)
    (cache / "stages" / "file").write_bytes(b"12345")
    monkeypatch.setenv("KDCLI_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call("doctor", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["cache"] == {"path": str(cache), "bytes": 5, "problem": None}
    assert found["variables"]["HF_HUB_OFFLINE"] == "1"
    assert found["variables"]["HF_TOKEN"] == "set"
    assert "s" * 30 not in result.out
    assert found["threads"] >= 1
    assert found["disk_free_bytes"]["here"] > 0
    assert "CPUExecutionProvider" in found["providers"]
    assert "cpu:" in call("doctor").out


def test_doctor_says_that_the_cache_cannot_be_written(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "file" / "cache"))
    assert "(from KDCLI_CACHE) cannot be written: Not a directory" in call("doctor").out


def test_doctor_survives_a_broken_installation(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = json.loads(call("doctor", "--json").out)
    assert "onnxruntime" in found["providers"]
