"""``kdcli.distill(...)`` and its kin: the documented page runs, and a call is what the command is."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdcli
from kdcli import api
from kdcli.errors import InputError, UsageError
from kdcli.request import STAGES
from kdcli.stages import options
from tests import tiny

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.saved(tmp_path / "teacher")
    tiny.write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KDCLI_SEED", "7")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    student, one, both = names["student"], names["one"], names["both"]
    assert student.directory == Path("out/student")  # type: ignore[attr-defined]
    assert (tmp_path / "out/lowrank/model.onnx").is_file()
    said = capsys.readouterr().out
    assert "missed: accuracy>=0.99" in said
    assert "'1.5' must be at least 0 and below 1 2" in said
    assert "measure before\n" in said
    assert one.exit_code == 4  # type: ignore[attr-defined]
    assert one.directory is None  # type: ignore[attr-defined]
    assert [report.model.source for report in both] == ["out/student", "out/int8"]  # type: ignore[attr-defined]
    # What was passed, and nothing of the environment.
    config = student.config  # type: ignore[attr-defined]
    assert (config["epochs"].value, config["epochs"].origin) == (1, "argument")
    assert (config["seed"].value, config["seed"].origin) == (0, "default")
    assert student.command == [  # type: ignore[attr-defined]
        *("kdcli", "distill", "--teacher", "teacher", "--student", "1x16", "--epochs", "1"),
        *("--out", "out/student", "--data", "data"),
    ]


def test_importing_kdcli_imports_nothing_else() -> None:
    code = "import sys, kdcli; kdcli.__version__; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "pydantic", "typer", "numpy", "json"}


@pytest.mark.parametrize("stage", STAGES)
def test_signatures_are_made_from_the_options(stage: str) -> None:
    function = api.FUNCTIONS[stage]
    assert getattr(kdcli, stage) is function
    found = inspect.signature(function).parameters
    declared = [one.argument for one in options.of_stage(stage).values()]  # type: ignore[arg-type]
    assert list(found) == [*declared, "progress"]
    assert all(f"    {name}: " in (function.__doc__ or "") for name in found)


def test_the_command_in_the_report_asks_for_the_same() -> None:
    made = api.request_of(
        "lowrank",
        {
            "model": Path("a/b"),
            "include": ["x*", "y"],
            "set": {"samples": 8},
            "max_size": "2KiB",
            "offline": False,
            "merge": True,
            "rank": None,
        },
    )
    assert made.argv == (
        *("kdcli", "lowrank", "a/b", "--merge", "--include", "x*", "--include", "y", "--max-size", "2048"),
        *("--set", "samples=8", "--no-offline"),
    )
    assert made.options.model_dump(exclude_defaults=True) == {"merge": True, "include": ("x*", "y")}
    judged = api.request_of("evaluate", {"models": "a", "batch_size": 8})
    assert judged.argv == ("kdcli", "evaluate", "a", "--batch-size", "8")


def test_wrong_calls_name_the_argument() -> None:
    for given, words in (
        (
            {"model": "a", "sparsty": 0.5},
            r"kdcli\.prune\(\) has no argument 'sparsty': did you mean 'sparsity'",
        ),
        (
            {"model": "a", "max_drop": -1},
            r"kdcli\.prune\(\): max_drop: '-1' must be at least 0",
        ),
        ({"model": "a", "epochs": True}, r"kdcli\.prune\(\): epochs: true is not a value"),
        ({}, r"kdcli\.prune\(\): model is missing"),
    ):
        with pytest.raises(UsageError, match=words):
            kdcli.prune(**given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no argument 'resume'"):
        kdcli.evaluate("a", resume=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="by name"):
        kdcli.prune("a", "b")  # type: ignore[misc]
    with pytest.raises(InputError, match="neither a directory nor a known alias"):
        kdcli.prune("minlm")
    with pytest.raises(AttributeError, match="no attribute 'destil'"):
        kdcli.destil  # type: ignore[attr-defined]  # noqa: B018
