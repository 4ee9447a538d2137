"""Where an output goes when several runs want the same place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcli.errors import ExitCode, ResourceError, UsageError
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.request import Common, Request
from kdcli.run import life, output
from kdcli.stages.prune.options import PruneOptions
from tests import tiny


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def complete(path: Path, content: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / io.FILE).write_text(content)
    return path


def reserve(out: Path | None, *, force: bool = False):
    return output.reserved(out, "m", "prune", force=force, inputs=())


_HOLD = """
import sys
from pathlib import Path
from kdcli.run import output
with output.reserved(Path(sys.argv[1]), "m", "prune", force=False, inputs=()) as place:
    print(place, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``same``."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, "same"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "same"
    yield process
    process.kill()
    process.communicate()


def test_two_runs_without_a_name_get_two_names() -> None:
    with reserve(None) as one, reserve(None) as two:
        assert [str(one), str(two)] == ["kdcli-out/m-prune", "kdcli-out/m-prune-2"]
    assert not Path("kdcli-out").exists()  # nothing came of them
    complete(Path("kdcli-out/m-prune"))
    with reserve(None) as three:
        assert str(three) == "kdcli-out/m-prune-2"
    assert [p.name for p in Path("kdcli-out").iterdir()] == ["m-prune"]


def test_the_same_name_twice_is_refused_at_once(other: subprocess.Popen[str]) -> None:
    with pytest.raises(UsageError, match=rf"\(process {other.pid}\) writes to 'same'"), reserve(Path("same")):
        pass
    with pytest.raises(UsageError, match="writes to"), reserve(Path("same"), force=True):
        pass


def test_a_killed_run_keeps_nobody_out(other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert Path(".same.lock").exists()
    with reserve(Path("same")) as place:
        assert place == Path("same")
    assert not Path(".same.lock").exists()


def test_a_place_that_cannot_be_written_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="Read-only"), reserve(Path("same")):
        pass


@pytest.mark.parametrize("named", [True, False])
def test_what_came_in_the_meantime_is_never_replaced(named: bool) -> None:
    out = Path("out")
    with output.building(out, 0) as work:
        (work / "weights").write_text("mine")
        complete(out, "theirs")
        complete(Path("out-2"), "theirs too")
        if named:
            with pytest.raises(UsageError, match="in the meantime") as raised:
                output.publish(work, out)
            assert "'out-3'" in str(raised.value.hint)
        else:
            assert output.publish(work, out, named=False) == Path("out-3")
    assert (out / io.FILE).read_text() == "theirs"
    assert Path("out-2", io.FILE).read_text() == "theirs too"
    assert Path("out-3", "weights").read_text() == "mine"
    assert sorted(p.name for p in Path().iterdir()) == ["out", "out-2", "out-3"]


def test_force_replaces_only_what_kdcli_wrote() -> None:
    for content, kept in ((io.FILE, Path("a")), ("thesis.txt", Path("b-2"))):
        out = Path(kept.name[0])
        with output.building(out, 0) as work:
            (work / "weights").write_text("mine")
            out.mkdir()
            (out / content).write_text("theirs")
            if kept == out:
                assert output.publish(work, out, force=True) == out
            else:
                with pytest.raises(UsageError):
                    output.publish(work, out, force=True)
        assert (kept / "weights").read_text() == "mine"
    assert Path("b/thesis.txt").read_text() == "theirs"


def test_a_stage_keeps_its_result_beside_a_place_that_was_taken(data_dir: Path) -> None:
    class Meanwhile(Progress):
        def phase(self, title: str) -> None:
            if title == "measure after":
                complete(Path("out"), "theirs")

    request = Request(
        stage="prune",
        model=str(tiny.saved(Path("model").absolute())),
        options=PruneOptions(structure="neurons", sparsity=0.5, method="magnitude"),
        common=Common(out=Path("out"), data=str(data_dir), limit=8),
    )
    with pytest.raises(UsageError, match="in the meantime") as raised:
        life.run(request, Meanwhile())
    assert raised.value.exit_code == ExitCode.USAGE
    assert Path("out", io.FILE).read_text() == "theirs"
    assert io.read(Path("out-2")).complete


def test_a_mount_point_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(UsageError, match="mount point") as raised:
        output.choose(Path("out"), "m", "prune", force=False, inputs=())
    assert "-o out/model" in str(raised.value.hint)
