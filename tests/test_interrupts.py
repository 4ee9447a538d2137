"""A signal ends a run with its own code, wherever it arrives and whatever a library makes of it."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcli import interrupts
from kdcli.cli.app import main
from kdcli.errors import InputError, InterruptedRun
from tests import tiny

# Of the libraries (and, at the end, of kdcli) what is called in the phases of a stage, one after the other.
CALLS = {
    "read data": "kdcli.data.sources.extract",
    "configure": "transformers.AutoConfig.from_pretrained",
    "build the model": "torch.nn.Linear.__init__",
    "read weights": "kdcli.models.checkpoint.load_file",
    "fill weights": "torch.nn.Module._load_from_state_dict",
    "read the tokenizer": "transformers.AutoTokenizer.from_pretrained",
    "tokenise": "transformers.PreTrainedTokenizerFast.__call__",
    "run torch": "torch.nn.Module.__call__",
    "export": "torch.onnx.export",
    "open a session": "onnxruntime.InferenceSession.__init__",
    "run a session": "onnxruntime.InferenceSession.run",
    "save": "kdcli.models.checkpoint.save_file",
    "describe": "kdcli.report.card.card",
    "report": "kdcli.report.io.write",
    "publish": "os.fsync",
}


def raised(error: BaseException) -> None:
    raise error


def wrapped(error: BaseException) -> None:
    raise RuntimeError("Error(s) in loading state_dict:\n  size mismatch") from None  # as C++ may


def swallowed(error: BaseException) -> None:
    """As a bare except may."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("model") / "m", by_kdcli=True)


def _find(name: str) -> tuple[Any, str]:
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:at]))
        except ImportError:
            continue
        for part in parts[at:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise AssertionError(name)


def strike(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, then: Callable[[BaseException], None]
) -> list[int]:
    """Send a signal from inside the first call; the list that is returned is filled when it was."""
    owner, attribute = _find(name)
    original, sent = getattr(owner, attribute), []

    def struck(*args: Any, **kwargs: Any) -> Any:
        if not sent:
            sent.append(number)
            try:
                os.kill(os.getpid(), number)
            except BaseException as error:
                then(error)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, struck)
    return sent


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def prune(model: Path, data: Path) -> list[str]:
    words = ["prune", str(model), "--data", str(data), "--structure", "neurons", "--method", "magnitude"]
    return [*words, "--sparsity", "0.5", "--limit", "8", "-o", "out"]


@pytest.mark.parametrize(
    ("phase", "then"),
    [
        *((phase, raised) for phase in CALLS),
        *((phase, wrapped) for phase in ("fill weights", "tokenise", "run a session")),
        *((phase, swallowed) for phase in ("read weights", "export", "save", "publish")),
    ],
)
def test_sigterm_in_every_phase(
    phase: str,
    then: Callable[[BaseException], None],
    model: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sent = strike(monkeypatch, CALLS[phase], signal.SIGTERM, then)
    code = run(prune(model, data_dir))
    out, err = capfd.readouterr()
    assert sent
    assert code == 143, err
    assert out == ""
    assert "terminated" in err
    assert "does not fit" not in err
    assert not [p.name for p in tmp_path.iterdir() if "kdcli" in p.name or "out" in p.name]
    cache = Path(os.environ["KDCLI_CACHE"])
    assert not [p for p in cache.rglob(".*") if p.name != ".digests.json"]  # nothing half-written
    assert interrupts.caught() is None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_every_signal_has_its_code(
    number: int, code: int, model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = strike(monkeypatch, CALLS["fill weights"], number, wrapped)
    before = signal.getsignal(number)
    assert run(prune(model, data_dir)) == code
    assert sent == [number]
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_tear_the_clean_up_apart(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = strike(monkeypatch, "kdcli.report.card.card", signal.SIGTERM, raised)
    again: list[int] = []
    original = shutil.rmtree

    def clean(path: Any, *args: Any, **kwargs: Any) -> None:
        if first and ".out.tmp-" in str(path) and not again:
            again.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", clean)
    assert run(prune(model, data_dir)) == 143  # the first one's
    assert first
    assert again
    assert list(tmp_path.iterdir()) == []


def test_nothing_comes_between_the_renames_of_a_replacement(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(prune(model, data_dir)) == 0
    (tmp_path / "out" / "mine").touch()
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        original(source, target)
        if ".out.old-" in str(target):  # the old output is away, the new one not yet there
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "replace", replace)
    assert run([*prune(model, data_dir), "--force"]) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "report.json").is_file()
    assert not (tmp_path / "out" / "mine").exists()


def test_a_signal_that_is_ignored_stays_ignored(model: Path, data_dir: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
        "from kdcli import interrupts\n"
        "with interrupts.installed(): os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(interrupts.caught())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def _kept_from(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
    except Exception as error:  # as libraries do
        raise AssertionError("it was taken") from error


def test_no_except_clause_for_exceptions_takes_it() -> None:
    with interrupts.installed():
        with pytest.raises(InterruptedRun):
            _kept_from(signal.SIGTERM)
        assert interrupts.caught() == signal.SIGTERM
        with pytest.raises(InterruptedRun):
            interrupts.check()
        with interrupts.held():
            interrupts.check()
            os.kill(os.getpid(), signal.SIGTERM)
    interrupts.check()


def _step(signals: list[int], finished: list[str]) -> None:
    with interrupts.stepping() as steps:
        for number in signals:
            os.kill(os.getpid(), number)
        finished.append(signal.Signals(steps.signal or 0).name)


def test_a_loop_that_does_not_look_again_loses_nothing() -> None:
    finished: list[str] = []
    with pytest.raises(InterruptedRun):
        _step([signal.SIGTERM], finished)
    assert finished == ["SIGTERM"]
    assert interrupts.caught() is None
    with pytest.raises(InterruptedRun):
        _step([signal.SIGINT, signal.SIGINT], finished)  # the second one raises at once
    assert finished == ["SIGTERM"]


def test_an_error_on_the_way_stays_an_error_without_a_signal(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdcli.models.checkpoint.load_file", lambda path: raised(InputError("broken")))
    assert run(prune(model, data_dir)) == 3
