"""Help and completion are quick because they import almost nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli.cli.command import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "datasets",
    "accelerate",
    "sklearn",
    "scipy",
    "numpy",
}
SLOW = {"pydantic", "rich"}

_SHOW = """
import atexit, sys
atexit.register(lambda: print("\\nLOADED", *{name.split(".")[0] for name, m in sys.modules.items() if m}, flush=True))
from kdcli.cli.app import main
main()
"""


def loaded(*words: str, stdin: str | None = None, **variables: str) -> set[str]:
    """Packages in memory when kdcli has ended."""
    done = subprocess.run(
        [sys.executable, "-c", _SHOW, *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
    )
    return set(done.stdout.partition("LOADED")[2].split())


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    found = loaded(*words)
    assert "typer" in found
    assert not found & (HEAVY | SLOW)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
@pytest.mark.parametrize(
    "line", ["kdcli ", "kdcli prune --", "kdcli distill --method ", "kdcli distill --data "]
)
def test_completion_loads_nothing_heavy(shell: str, line: str) -> None:
    variables = {
        "_KDCLI_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": line.split(" ")[-1],
    }
    found = loaded(**variables)
    assert "typer" in found
    assert not found & (HEAVY | SLOW)


def test_a_stage_with_empty_stdin_ends_before_torch() -> None:
    found = loaded("prune", "-", stdin="")
    assert "typer" in found
    assert not found & HEAVY


def test_predict_waits_for_texts_without_torch() -> None:
    assert not loaded("predict", "tests", stdin="") & HEAVY  # any directory: no text came to be answered


def test_version_and_list_load_nothing_heavy() -> None:
    assert not loaded("--version") & HEAVY
    for what in ("models", "methods", "students", "structures", "strategies", "schemes"):
        assert not loaded("list", what) & HEAVY


def _seconds(words: list[str], variables: dict[str, str]) -> float:
    """Processor time of one process: on a busy machine the clock on the wall says little."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the processor time of a child")
def test_start_up_takes_at_most_1_6_times_importing_typer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after an installation, which compiles: both sides start from bytecode.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    completion = {
        "_KDCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": "kdcli distill --teacher minilm --method ",
        "COMP_CWORD": "5",
    }
    cases: dict[str, tuple[list[str], dict[str, str]]] = {
        "help": (["-m", "kdcli", "--help"], {}),
        "distill help": (["-m", "kdcli", "distill", "--help"], {}),
        "completion": (["-m", "kdcli"], completion),
    }
    cases["import typer"] = (["-c", "import typer"], {})
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(10):  # interleaved, so that a busy moment hits all of them
        for name, (words, variables) in cases.items():
            seconds = _seconds(words, variables)
            if round_:
                taken[name].append(seconds)
    base = statistics.median(taken.pop("import typer"))
    times = {name: statistics.median(found) / base for name, found in taken.items()}
    assert max(times.values()) <= 1.6, f"times of 'import typer': {times}"
