"""One way to call kdcli in this process."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdcli.cli.app import main
from tests.cli.fakes import Recorder


@dataclass
class Result:
    """What a process leaves behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, no settings from outside, and no signal handler left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("KDCLI_DEBUG", "NO_COLOR", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Fake stages."""
    made = Recorder()
    made.install(monkeypatch.setitem, monkeypatch.setattr)
    return made


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Call:
    """Run kdcli with these words; ``model`` exists as a directory."""
    Path("model").mkdir()

    def run(*words: str, stdin: str = "", terminal: bool = False) -> Result:
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capfd.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return run
