"""Lines, progress and colours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli.cli import console as consoles
from kdcli.cli.console import Console, clean, duration

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(consoles.time, "monotonic", lambda: self.now)


def test_a_line_of_progress_every_five_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Console().task("train", 200) as task:
        for _ in range(20):
            clock.now += 1.0
            task.advance(10, "loss 0.31")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  train 50/200  25%  loss 0.31  ETA 15s"
    assert lines[1] == "  train 100/200  50%  loss 0.31  ETA 10s"
    assert lines[-1] == "  train 200/200  loss 0.31  took 20s"
    assert len(lines) == 4


def test_a_short_task_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Console().task("train", 3) as task:
        for _ in range(3):
            clock.now += 1.0
            task.advance()
    assert capsys.readouterr().err == ""


def test_quiet_keeps_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("kdcli prune", quiet=True)
    console.phase("export")
    console.note("a note")
    console.warn("a warning")
    console.error("it failed", "try again")
    assert capsys.readouterr().err == "kdcli prune: it failed\n  try again\n"


def test_phases_notes_and_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    console = Console("kdcli prune", verbose=True)
    console.phase("export")
    clock.now += 65
    console.phase("measure")
    console.note("from the cache")
    console.warn("slow")
    assert capsys.readouterr().err.splitlines() == [
        "kdcli prune: export",
        "  export took 1m05s",
        "kdcli prune: measure",
        "  from the cache",
        "  warning: slow",
    ]


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Console().note("label \x1b]0;owned\x07 \u202eabc")
    err = capsys.readouterr().err
    assert err == "  label \\x1b]0;owned\\x07 \\u202eabc\n"
    assert clean("a\tb\nc") == "a\tb\nc"


def test_secrets_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for say in (console.note, console.warn, console.error):
        say("https://me:hunter22@host and hf_" + "x" * 20)
    err = capsys.readouterr().err
    assert "hunter22" not in err
    assert "x" * 20 not in err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (7320, "2h02m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


_ON_A_TERMINAL = """
import os, pty, sys
done = pty.spawn([sys.executable, "-m", "tests.cli.fakes", "prune", "x/y"])
sys.exit(os.waitstatus_to_exitcode(done))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize(
    ("variables", "bars", "colours"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, False, False)],
)
def test_on_a_terminal_there_are_bars(variables: dict[str, str], bars: bool, colours: bool) -> None:
    clean_environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_TERMINAL],
        cwd=ROOT,
        env={**clean_environment, "TERM": "xterm", "FAKE_STAGE": "tasks", "COLUMNS": "100", **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert "x/y-prune" in done.stdout
    assert ("3/3" in done.stdout) is bars
    assert bool(re.search(r"\x1b\[3[1-6]m", done.stdout)) is colours
