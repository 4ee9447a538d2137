"""The completion scripts, run by the shells that are here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli import registry
from kdcli.cli.command import COMMANDS
from kdcli.models.aliases import MODELS, SMALL_STUDENTS
from kdcli.stages.distill.options import INITS, STRATEGIES, STUDENT_PRESETS
from kdcli.stages.prune.options import STRUCTURES
from kdcli.stages.quantize.options import SCHEMES

ROOT = Path(__file__).resolve().parents[2]

CASES = [
    ("kdcli ", set(COMMANDS)),
    ("kdcli pr", {"predict", "prune"}),
    ("kdcli prune --spars", {"--sparsity"}),
    ("kdcli prune model --method ", set(registry.names("prune"))),
    ("kdcli distill --method ", set(registry.names("distill"))),
    ("kdcli prune model --structure h", {name for name in STRUCTURES if name.startswith("h")}),
    ("kdcli quantize model --scheme ", set(SCHEMES)),
    ("kdcli lowrank model --method ", set(registry.names("lowrank"))),
    ("kdcli distill --strategy ", set(STRATEGIES)),
    ("kdcli distill --init ", set(INITS)),
    ("kdcli distill --student ", {*STUDENT_PRESETS, *SMALL_STUDENTS}),
    ("kdcli distill --student tiny --teacher ", set(MODELS)),
    ("kdcli prune mini", {"minilm"}),
    ("kdcli distill --data r", {"rotten-tomatoes"}),
    ("kdcli prune model --device c", {"cpu", "cuda"}),
    ("kdcli list m", {"models", "methods"}),
]


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``kdcli`` is a command."""
    script = tmp_path / "bin" / "kdcli"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m kdcli "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}


def run(words: list[str], environment: dict[str, str]) -> str:
    """stdout of a process that must succeed."""
    done = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash_completes(path: dict[str, str], line: str, expected: set[str]) -> None:
    script = """
        source completions/kdcli.bash
        complete -p kdcli | grep -q _kdcli_completion || exit 9
        COMP_WORDS=($1); [[ $1 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _kdcli_completion kdcli
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert set(run(["bash", "--norc", "-c", script, "bash", line], path).split()) == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
@pytest.mark.parametrize("shell", ["zsh", "fish", "powershell"])
def test_other_shells_are_answered_in_their_protocol(
    path: dict[str, str], shell: str, line: str, expected: set[str]
) -> None:
    word = line.rpartition(" ")[2]
    asked = path | {
        "_KDCLI_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": word,
    }
    out = run(["kdcli"], asked)
    if shell == "zsh":
        found = {part.split('"')[1] for part in out.partition("((")[2].splitlines() if part.startswith('"')}
    else:
        found = {part.split("\t")[0].split(":::")[0] for part in out.splitlines() if part.strip()}
    assert found == expected


def test_descriptions_come_along(path: dict[str, str]) -> None:
    asked = {"_KDCLI_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": "kdcli pru"}
    out = run(["kdcli"], path | asked | {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})
    assert out.strip() == f"prune\t{COMMANDS['prune']}"


_OTHERS = {
    "zsh": [
        "-f",
        "-c",
        "autoload -Uz compinit; compinit -u -D; source completions/_kdcli; print $_comps[kdcli]",
    ],
    "fish": ["--no-config", "-c", "source completions/kdcli.fish; complete -C 'kdcli pru'"],
    "pwsh": ["-NoProfile", "-Command", ". ./completions/kdcli.ps1; 'kdcli'"],
}


@pytest.mark.parametrize("shell", _OTHERS)
def test_scripts_load_in_the_other_shells(path: dict[str, str], shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed; its protocol is tested above")
    out = run([shell, *_OTHERS[shell]], path)
    assert "kdcli" in out or "prune" in out
