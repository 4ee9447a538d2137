"""Generated files are up to date, and say so when they are not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from kdcli.cli.command import COMMANDS, build, flag_of
from kdcli.errors import MEANING

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gen() -> ModuleType:
    """tools/gen.py, which is no package."""
    spec = importlib.util.spec_from_file_location("gen", ROOT / "tools" / "gen.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date(gen: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    code = gen.main(["--check"])
    said = capsys.readouterr()
    assert code == 0, f"{said.err}{said.out}"


def test_a_stale_file_is_shown_and_then_written(
    gen: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gen, "ROOT", tmp_path)
    monkeypatch.setattr(gen, "tables", dict)
    monkeypatch.setattr(gen, "files", lambda: {"docs/a.md": "new\n", "docs/b.md": "same\n"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("old\n")
    (tmp_path / "docs" / "b.md").write_text("same\n")
    assert gen.main(["--check"]) == 1
    said = capsys.readouterr()
    assert "-old\n" in said.out
    assert "+new\n" in said.out
    assert said.err == "out of date: docs/a.md; run: python tools/gen.py\n"
    assert (tmp_path / "docs" / "a.md").read_text() == "old\n"
    assert gen.main([]) == 0
    assert gen.main(["--check"]) == 0
    assert (tmp_path / "docs" / "a.md").read_text() == "new\n"


def test_the_reference_has_every_command_and_option(gen: ModuleType) -> None:
    made = gen.files()
    for name in COMMANDS:
        assert f"## kdcli {name}\n" in made["docs/cli.md"]
        for param in build(name).params:
            if (flag := flag_of(param)) is not None:
                assert f"`--{flag}`" in made["docs/cli.md"]
    for code, meaning in MEANING.items():
        assert f"| {int(code)} | `{code.name}` | {meaning} |" in made["docs/exit-codes.md"]
    assert json.loads(made["docs/report.schema.json"])["properties"]["schema_version"]["const"] == 2
    assert {name for name in made if name.startswith("completions/")} == {
        "completions/kdcli.bash",
        "completions/_kdcli",
        "completions/kdcli.fish",
        "completions/kdcli.ps1",
    }
