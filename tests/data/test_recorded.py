"""Data that a model's own report names: found from anywhere, never another's of the same name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kdcli.data import recorded, sources
from kdcli.errors import InputError
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.report.schema import DataInfo, Report
from kdcli.request import Common, Gates, Request
from kdcli.run import life, recipe
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.prune.options import PruneOptions
from tests import tiny


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Path:
    """A project whose model was made with the relative path ``data/reviews``; the current directory."""
    place = tmp_path / "project"
    tiny.saved(place / "model")
    shutil.copytree(data_dir, place / "data" / "reviews")
    monkeypatch.chdir(place)
    prune("model", "out/p1", data="data/reviews")
    return place


def prune(model: str, out: str, data: str | None = None) -> Report:
    options = PruneOptions(sparsity=0.2, method="taylor", schedule="one-shot")
    request = Request(stage="prune", model=model, options=options, common=Common(out=Path(out), data=data))
    outcome = life.run(request, Progress())
    assert outcome is not None
    return outcome.report


def judge(model: str, **common) -> Report:
    options = EvaluateOptions(models=(model,), batch_sizes=(1,))
    request = Request(stage="evaluate", model=None, options=options, common=Common(**common))
    return life.run(request, Progress()).report


def codes(report: Report) -> set[str]:
    return {w.code for w in report.warnings}


def test_a_relative_path_is_the_models(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = io.read(Path("out/p1")).data
    assert stored is not None
    assert (stored.ref, stored.kind, stored.path) == ("data/reviews", "path", "../../data/reviews")
    assert str(tmp_path) not in (project / "out" / "p1" / "report.json").read_text()
    elsewhere = tmp_path / "elsewhere"
    tiny.write_data(elsewhere / "data" / "reviews", seed=9)  # another's data of the same name
    monkeypatch.chdir(elsewhere)
    report = judge("../project/out/p1", gates=Gates(max_drop=1.0))
    assert report.data is not None
    assert report.data.ref == "data/reviews"
    assert report.data.fingerprint == stored.fingerprint
    assert report.gates[0].passed  # the record is of the same rows
    # The next step remembers them from where it is, under the name that was typed first.
    second = prune("../project/out/p1", "p2").data
    assert second is not None
    assert (second.ref, second.path) == ("data/reviews", "../../project/data/reviews")
    assert prune("p2", "deep/down/p3").data == second.model_copy(
        update={"path": "../../../../project/data/reviews"}
    )
    # A project that has moved as a whole.
    monkeypatch.chdir(tmp_path)
    shutil.move(project, tmp_path / "moved")
    assert judge("moved/out/p1").data == report.data
    with pytest.raises(InputError, match="no longer at"):
        judge("elsewhere/p2")
    # A model that was copied alone.
    shutil.copytree("moved/out/p1", "alone/somewhere/p1")
    with pytest.raises(InputError, match=r"made with the data 'data/reviews', which is no longer at"):
        judge("alone/somewhere/p1")
    given = judge("alone/somewhere/p1", data="moved/data/reviews", gates=Gates(max_drop=1.0))
    assert given.gates[0].passed


def test_data_that_have_changed_are_said_to_and_not_compared(project: Path) -> None:
    tiny.write_data(project / "data" / "reviews", seed=5)
    report = judge("out/p1", gates=Gates(max_drop=1.0))
    assert "data-changed" in codes(report)
    assert not report.gates[0].passed
    assert report.delta.main is None


def test_an_older_report_counts_where_its_name_leads_to_the_same_rows(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = io.read(Path("out/p1"))
    assert old.data is not None
    stripped = old.model_copy(update={"data": old.data.model_copy(update={"kind": None, "path": None})})
    io.write(stripped, Path("out/p1"))
    assert "data-changed" not in codes(judge("out/p1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not say where that is"):  # and not asked of the hub
        judge("project/out/p1")
    tiny.write_data(tmp_path / "data" / "reviews", seed=9)
    with pytest.raises(InputError, match="not those that the model was made with"):
        judge("project/out/p1")


def test_names_of_the_hub_and_aliases_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alias = next(iter(sources.ALIASES))
    for ref, kind in (("org/reviews", "hub"), (alias, "alias")):
        info = DataInfo(ref=ref, fingerprint="f", rows={"test": 2}, kind=kind)
        assert recorded.find(info, tmp_path).place == ref
        (tmp_path / ref).mkdir(parents=True)
        with pytest.raises(InputError, match="a file or directory of that name"):
            recorded.find(info, tmp_path)
    gone = DataInfo(ref=str(tmp_path / "gone"), fingerprint="f", rows={}, kind="path")
    with pytest.raises(InputError, match="which is not there"):
        recorded.find(gone, tmp_path)


def test_a_stage_from_the_cache_of_recipes_knows_where_its_data_are(project: Path) -> None:
    Path("recipe.yaml").write_text(
        "model: model\ndata: data/reviews\nstages:\n  - prune: {sparsity: 0.2, method: taylor, schedule: one-shot}\n"
    )
    for out in ("one", "two/levels"):
        recipe.run(Path("recipe.yaml"), Path(out), False, Progress(), False)
        assert "data-changed" not in codes(judge(f"{out}/1-prune"))
    stored = io.read(Path("two/levels/1-prune")).data
    assert stored is not None
    assert stored.path == "../../../data/reviews"


def test_a_stage_from_the_cache_of_recipes_has_the_command_that_took_it(project: Path) -> None:
    Path("recipe.yaml").write_text(
        "model: model\ndata: data/reviews\nstages:\n  - quantize: {scheme: fp16}\n"
    )
    commands = [["kdcli", "run", "recipe.yaml", "-o", out] for out in ("one", "two")]
    for command in commands:
        recipe.run(Path("recipe.yaml"), Path(command[-1]), False, Progress(), False, command)
    first, second = (io.read(Path(command[-1]) / "1-quantize") for command in commands)
    assert [first.command, second.command] == commands
    assert first.method is not None
    assert second.method is not None
    assert "recipe_cache" not in first.method.detail
    assert second.method.detail["recipe_cache"] == {"made_by": commands[0], "made_at": first.created_at}
    card = Path("two/1-quantize/README.md").read_text(encoding="utf-8")
    assert "kdcli run recipe.yaml -o two" in card
    assert "-o one" not in card
    stored = {one.path: one.sha256 for one in second.artifacts}
    assert stored["README.md"] == io.sha256_of(Path("two/1-quantize/README.md"))
