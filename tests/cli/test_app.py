"""Versions, errors and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from kdcli import __version__, errors, run
from kdcli.cli.command import COMMANDS
from tests.cli.conftest import Call
from tests.cli.fakes import Recorder

ROOT = Path(__file__).resolve().parents[2]


def test_version_names_what_matters(call: Call) -> None:
    lines = call("--version").out.splitlines()
    assert lines[0] == f"kdcli {__version__}"
    assert [line.split()[0] for line in lines[1:]] == [
        "python",
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "typer",
    ]


def test_no_command_shows_help_and_is_a_usage_error(call: Call) -> None:
    result = call()
    assert result.code == 2
    assert all(name in result.err for name in COMMANDS)
    assert result.out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prun", "model"], "did you mean 'prune'?"),
        (["prune", "model", "--sparsty", "0.5"], "no option --sparsty: did you mean '--sparsity'?"),
        (["prune", "model", "--zzz"], "no option --zzz"),
        (["prune"], "MODEL"),
        (["prune", "model", "other"], "unexpected extra argument"),
        (["distill", "--student", "tiny"], "--teacher"),
        (["prune", "model", "--structure", "head"], "did you mean 'heads'?"),
        (["prune", "model", "--method", "tayler"], "did you mean 'taylor'?"),
        (["distill", "--teacher", "model", "--student", "tinny"], "did you mean 'tiny'?"),
        (["distill", "--teacher", "model", "--student", "tiny", "--strategy", "self-x"], "teacher-assisted"),
        (["distill", "--teacher", "model", "--student", "tiny", "--init", "hubb"], "did you mean 'hub'?"),
        (["quantize", "model", "--scheme", "int9"], "unknown scheme 'int9'"),
        (["list", "model"], "did you mean 'models'?"),
        (["prune", "model", "--gate", "acuracy>=1"], "did you mean 'accuracy'?"),
        (["prune", "model", "--set", "steps"], "KEY=VALUE"),
        (["distill", "--teacher", "model", "--student", "tiny", "--weight", "crd=-1"], "--weight"),
        (["prune", "model", "--max-size", "20 boxes"], "is not a size"),
        (["prune", "model", "--sparsity", "0.5", "--budget", "0.5"], "exclude each other"),
        (["prune", "model", "--sparsity", "0.5", "--target-speedup", "2"], "--target-speedup exclude"),
        (["prune", "model", "--target-speedup", "1"], "above 1"),
    ],
)
def test_usage_errors_say_what_is_allowed(
    call: Call, recorder: Recorder, words: list[str], said: str
) -> None:
    result = call(*words)
    assert result.code == 2
    assert said in result.err
    assert result.err.startswith("kdcli")
    assert "Traceback" not in result.err
    assert result.out == ""
    assert recorder.requests == []


def test_unknown_model_is_bad_input_with_the_likeliest_alias(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kdcli.run.preflight")  # the real one
    monkeypatch.setattr(run, "preflight", importlib.import_module("kdcli.run.preflight"))
    result = call("prune", "minlm")
    assert (result.code, result.out, recorder.requests) == (3, "", [])
    assert "did you mean 'minilm'?" in result.err


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def wrapped(error: BaseException, *causes: BaseException) -> BaseException:
    """As ``raise error from cause`` leaves it."""
    for one, cause in pairwise([error, *causes]):
        one.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.UsageError("wrong order", "prune first"), 2, ["wrong order", "prune first"]),
        (errors.InputError("broken file"), 3, ["broken file"]),
        (errors.ParityError("differs"), 5, ["differs"]),
        (errors.ResourceError("no device"), 6, ["no device"]),
        (errors.UnavailableError("not here"), 7, ["not here"]),
        (errors.InterruptedRun("stopped at step 3"), 130, ["stopped at step 3"]),
        (errors.InterruptedRun("stopped", terminated=True), 143, ["stopped"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (MemoryError(), 6, ["out of memory", "--batch-size"]),
        (OutOfMemoryError("CUDA out of memory"), 6, ["out of memory"]),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            6,
            ["out of memory"],
        ),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 6, ["no space left", "out/x"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 6, ["no space left"]),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 6, ["cannot be written", "/x", "kdcli doctor"]),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 6, ["TMPDIR"]),
        (
            wrapped(
                errors.InputError("cannot be exported"), OSError(errno.ENOSPC, "No space left on device")
            ),
            6,
            ["no space left"],
        ),
        (wrapped(errors.InputError("cannot be loaded"), ValueError(), MemoryError()), 6, ["out of memory"]),
        (
            wrapped(errors.InputError("cannot be read"), OSError(errno.EACCES, "denied")),
            3,
            ["cannot be read"],
        ),
        (ValueError("surprise"), 1, ["bug in kdcli", "ValueError: surprise", "--debug"]),
        (OSError(errno.EIO, "Input/output error"), 1, ["bug in kdcli"]),
    ],
)
def test_every_error_has_its_exit_code(
    call: Call, recorder: Recorder, error: BaseException, code: int, said: list[str]
) -> None:
    recorder.error = error
    result = call("prune", "model")
    assert result.code == code
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "kdcli prune: " in result.err
    for part in said:
        assert part in result.err


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    recorder.error = ValueError("surprise")
    if way == "variable":
        monkeypatch.setenv("KDCLI_DEBUG", "1")
    result = call("prune", "model", *(["--debug"] if way == "flag" else []))
    assert result.code == 1
    assert "Traceback" in result.err
    assert "fakes.py" in result.err


def test_secrets_do_not_reach_the_terminal_or_the_report(call: Call, recorder: Recorder) -> None:
    token = "hf_" + "a" * 30
    recorder.error = errors.UnavailableError(f"https://user:{token}@host/x refused")
    result = call("prune", "model", "--data", f"https://me:{token}@host/data", "--debug")
    assert token not in result.err
    assert token not in " ".join(recorder.request.argv)
    assert recorder.request.argv[:3] == ("kdcli", "prune", "model")


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["list", "models"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *words], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_sigterm_ends_a_stage_with_143() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.fakes", "prune", "x/y"],
        cwd=ROOT,
        env={**os.environ, "FAKE_STAGE": "wait"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert out == ""
    assert "kdcli prune: terminated" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_an_example(call: Call, name: str) -> None:
    result = call(name, "--help")
    assert result.code == 0
    assert result.out.index("Example:") < result.out.index("Options:")
    assert f"kdcli {name}" in result.out.partition("Example:")[2]
    assert result.out == call(name, "-h").out
