"""A distillation of several trainings, interrupted in any of them and resumed, ends with the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kdcli.errors import InterruptedRun, UsageError
from kdcli.progress import Progress, ProgressTask
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.distill.options import DistillOptions
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


class Killer(Progress):
    """Sends SIGINT to this process after so many training steps of the run, whichever training they are in."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.where: str | None = None

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[ProgressTask]:
        yield _Fuse(self, title)


class _Fuse(ProgressTask):
    def __init__(self, killer: Killer, title: str) -> None:
        self.killer, self.title = killer, title

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if self.title.startswith("training the") and steps == 1:
            self.killer.left -= 1
            if self.killer.left == 0:
                self.killer.where = self.title
                os.kill(os.getpid(), signal.SIGINT)


def request(teacher: Path, data: Path, out: Path, **options) -> Request:
    given = {"student": "1x16", "epochs": 3, "lr": 5e-3, "batch_size": 32, "init": "teacher", "augment": 1}
    return Request(
        stage="distill",
        model=None,
        options=DistillOptions(teachers=(str(teacher),), **(given | options)),
        common=Common(out=out, data=str(data), settings={"phases": "two"}),
        argv=("kdcli", "distill"),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("teacher") / "teacher")


CASES = {
    # Each training has 6 steps an epoch, 3 without extra texts: 2 x 6 of the features, 4 x 6 of the student
    # and so on.
    "features": (3, {"methods": ("response", "hidden")}, "student features"),
    "student": (8, {"methods": ("response", "hidden")}, "the student"),
    "assistant": (9, {"strategy": "assistant-chain"}, "assistant"),
    "after the assistant": (25, {"strategy": "assistant-chain"}, "student"),
    "a layer": (1, {"strategy": "layerwise"}, "layer"),
    "peers": (2, {"strategy": "online", "augment": None}, "peers"),
    "control": (20, {"control": True}, "control"),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_uninterrupted(
    case: str, teacher: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after, options, where = CASES[case]
    if options.get("strategy") == "assistant-chain":
        common = {"phases": "two", "assistants": "1x24"}
    else:
        common = {"phases": "two", "layer_epochs": "1"}

    def made(out: Path, resume: bool = False) -> Request:
        one = request(teacher, data_dir, out, **options)
        return replace(one, common=one.common.model_copy(update={"settings": common, "resume": resume}))

    whole = life.run(made(tmp_path / "whole"), Progress())
    killer = Killer(after)
    with pytest.raises(InterruptedRun):
        life.run(made(tmp_path / "cut"), killer)
    assert killer.where is not None
    assert where in killer.where
    assert not (tmp_path / "cut").exists()  # nothing half-written
    life.run(made(tmp_path / "cut", resume=True), Progress())
    for name in ("model.safetensors", "model.onnx"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole.path / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_option_refuses_and_names_itself(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        life.run(request(teacher, data_dir, tmp_path / "out"), Killer(3))
    for options, word in (({"lr": 1e-3}, "option lr"), ({"alpha": 0.9}, "option alpha")):
        changed = request(teacher, data_dir, tmp_path / "out", **options)
        changed = replace(changed, common=changed.common.model_copy(update={"resume": True}))
        with pytest.raises(UsageError, match=f"differs from the interrupted one in {word}"):
            life.run(changed, Progress())


def test_changed_data_refuse_and_name_themselves(teacher: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    with pytest.raises(InterruptedRun):
        life.run(request(teacher, data, tmp_path / "out"), Killer(3))
    tiny.write_data(tmp_path / "data", seed=1)
    again = request(teacher, data, tmp_path / "out")
    with pytest.raises(UsageError, match="training rows, validation rows"):
        life.run(replace(again, common=again.common.model_copy(update={"resume": True})), Progress())
