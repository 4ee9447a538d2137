"""stdout is the result alone; stdin is one line of the stage before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.cli.fakes import Recorder

ROOT = Path(__file__).resolve().parents[2]
FAKE = f"{sys.executable} -m tests.cli.fakes"


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the fake kdcli as ``kd``."""
    return subprocess.run(
        ["bash", "-c", f'kd() {{ {FAKE} "$@"; }}; {script}'],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_line_of_stdin_is_the_model(call: Call, recorder: Recorder) -> None:
    result = call("prune", "-", stdin="out/student\n")
    assert (result.code, result.out) == (0, "out/made\n")
    assert recorder.request.model == "out/student"


def test_stdin_may_be_teacher_baseline_or_several_models(call: Call, recorder: Recorder) -> None:
    call("distill", "--teacher", "-", "--student", "tiny", stdin="org/teacher\n")
    call("evaluate", "model", "--baseline", "-", stdin="org/base\n")
    call("evaluate", "-", "model", stdin="a b\nc\n\n")
    asked = [request.options for request in recorder.requests]
    assert asked[0].teachers == ("org/teacher",)  # type: ignore[union-attr]
    assert asked[1].baseline == "org/base"  # type: ignore[union-attr]
    assert asked[2].models == ("a b", "c", "model")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("stdin", "terminal", "said"),
    [
        ("", False, "the stage before failed"),
        ("  \n\n", False, "the stage before failed"),
        ("", True, "stdin is a terminal"),
        ('{"schema_version": 1}\n', False, "without --json"),
        ("a\nb\n", False, "2 lines"),
    ],
)
def test_a_useless_stdin_is_a_usage_error(
    call: Call, recorder: Recorder, stdin: str, terminal: bool, said: str
) -> None:
    result = call("prune", "-", stdin=stdin, terminal=terminal)
    assert (result.code, result.out, recorder.requests) == (2, "", [])
    assert said in result.err


def test_nothing_but_the_path_reaches_stdout() -> None:
    done = shell("kd prune x/y")
    assert (done.returncode, done.stdout) == (0, "x/y-prune\n")
    for said in ("a library prints", "native code prints", "a child prints", "kdcli prune: measure before"):
        assert said in done.stderr


def test_nothing_but_the_report_reaches_stdout() -> None:
    done = shell("kd prune x/y --json")
    assert json.loads(done.stdout)["kind"] == "kdcli.report"
    assert "a library prints" in done.stderr


def test_stages_chain_through_pipes() -> None:
    done = shell("kd distill --teacher x/y --student tiny | kd prune - | kd quantize - | kd evaluate -")
    assert (done.returncode, done.stdout) == (0, "teacher-distill-prune-quantize-evaluate\n")


def test_a_missed_gate_stops_the_chain_without_pipefail() -> None:
    done = shell("FAKE_STAGE=gate kd prune x/y | kd quantize -; echo ${PIPESTATUS[@]}")
    assert done.stdout == "4 2\n"
    assert "gate missed: accuracy>=0.9" in done.stderr
    assert "x/y-prune" in done.stderr
    assert "stdin is empty" in done.stderr


def test_a_reader_that_went_away_is_no_error() -> None:
    done = shell(
        "kd prune x/y | true; echo ${PIPESTATUS[0]}; kd list models | head -n 1; echo ${PIPESTATUS[0]}"
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("0", "0", 3)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_survived(closed: str) -> None:
    done = shell(f"exec 9>&1; kd prune x/y {closed}; echo code $? >&9")
    assert "code 0" in done.stdout
    assert "a library prints" not in done.stdout


def test_a_full_disk_on_stdout_is_a_resource_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell("kd prune x/y > /dev/full; echo $?")
    assert done.stdout == "6\n"
    assert "no space left" in done.stderr


def test_a_full_disk_in_a_stage_is_a_resource_error() -> None:
    done = shell("kd prune x/y", FAKE_STAGE="full")
    assert (done.returncode, done.stdout) == (6, "")
