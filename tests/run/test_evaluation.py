"""Evaluate, recipes and the shared life of a stage, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from kdcli.errors import ExitCode, InputError, ParityError, UsageError
from kdcli.export import onnx as exporter
from kdcli.models import checkpoint as checkpoints
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.request import Common, Gates, Request
from kdcli.run import life, recipe
from kdcli.run.outcome import Outcome
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint ``a``, another one ``b``."""
    base = tmp_path_factory.mktemp("models")
    tiny.saved(base / "a")
    tiny.saved(base / "b", seed=1)
    return base


def judge(*names: Path, data: Path, common: dict | None = None, **options) -> Outcome:
    given = EvaluateOptions(models=tuple(str(n) for n in names), batch_sizes=(1,), **options)
    request = Request(
        stage="evaluate",
        model=None,
        options=given,
        common=Common(data=str(data), **(common or {})),
        argv=("kdcli",),
    )
    return life.run(request, Progress())


def prune(model: Path, out: Path, data: Path, **common) -> Outcome:
    options = PruneOptions(sparsity=0.4, method="taylor", schedule="one-shot")
    given = Common(out=out, data=str(data), **common)
    return life.run(Request(stage="prune", model=str(model), options=options, common=given), Progress())


def test_a_model_against_itself_and_against_another(models: Path, data_dir: Path) -> None:
    same = judge(models / "a", data=data_dir, baseline=str(models / "a")).report
    assert same.delta.accuracy == 0
    assert same.delta.agreement == 1
    assert same.delta.p_value == 1
    other = judge(models / "a", data=data_dir, baseline=str(models / "b")).report
    assert other.delta.agreement is not None
    assert other.delta.agreement < 1
    assert other.before is not None
    assert other.before.compute.macs  # not zero on the CPU


def test_torch_and_onnx_give_the_same_quality(models: Path, data_dir: Path) -> None:
    one = judge(models / "a", data=data_dir, runtime="torch").report.after
    two = judge(models / "a", data=data_dir, runtime="both").report.after
    assert one.quality is not None
    assert two.quality is not None
    assert one.quality.accuracy == two.quality.accuracy
    assert [entry.runtime for entry in two.latency] == ["onnx", "torch"]


def test_it_writes_a_copy_only_when_asked(models: Path, data_dir: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in (models / "a").iterdir()}
    assert judge(models / "a", data=data_dir).path == models / "a"
    assert {p.name: p.read_bytes() for p in (models / "a").iterdir()} == before  # never written to
    out = tmp_path / "judged"
    assert judge(models / "a", data=data_dir, common={"out": out}).path == out
    assert io.read(out).stage == "evaluate"
    assert (out / "model.onnx").is_file()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == before[name]


def test_plain_transformers_reads_the_right_tokenizer_out_of_the_copy(data_dir: Path, tmp_path: Path) -> None:
    model, out, text = tiny.saved(tmp_path / "model"), tmp_path / "judged", "A good-film"
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("-", " ")])
    backend.save(str(model / "tokenizer.json"))
    settings = model / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "BertTokenizer"}
    settings.write_text(json.dumps(named), encoding="utf-8")
    right = backend.encode(text).ids
    assert AutoTokenizer.from_pretrained(model)(text)["input_ids"] != right  # made anew from the vocabulary
    judge(model, data=data_dir, common={"out": out})
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == right
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_without_baseline_the_lineage_is_the_measure(models: Path, data_dir: Path, tmp_path: Path) -> None:
    first = prune(models / "a", tmp_path / "p1", data_dir).report
    prune(tmp_path / "p1", tmp_path / "p2", data_dir)
    report = judge(tmp_path / "p2", data=data_dir, common={"gates": Gates(max_drop=1.0)}).report
    assert first.before is not None
    assert report.before == first.before.model_copy(update={"latency": []})
    assert report.delta.speedup is None
    assert "recorded-baseline" in {w.code for w in report.warnings}
    assert report.gates[0].passed
    # A plain model has no lineage: a gate that needs one cannot pass.
    alone = judge(models / "a", data=data_dir, common={"gates": Gates(max_drop=1.0)}).report
    assert not alone.gates[0].passed
    assert alone.exit_code == ExitCode.GATE


def test_a_record_of_other_rows_is_no_measure(models: Path, data_dir: Path, tmp_path: Path) -> None:
    prune(models / "a", tmp_path / "p1", data_dir)
    newer = tiny.write_data(tmp_path / "newer", seed=7)  # as many rows, but others
    limits = Gates(max_drop=1.0, min_speedup=0.0001)
    report = judge(tmp_path / "p1", data=newer, common={"gates": limits}).report
    assert report.before is not None
    assert report.before.quality is None
    assert report.delta.main is None
    assert [gate.passed for gate in report.gates] == [False, False]
    assert all(gate.reason is not None and "--baseline" in gate.reason for gate in report.gates)
    assert {"other-rows", "recorded-baseline"} <= {w.code for w in report.warnings}
    measured = judge(tmp_path / "p1", data=newer, baseline=str(models / "a"), common={"gates": limits}).report
    assert [gate.passed for gate in measured.gates] == [True, True]
    assert not {"other-rows", "recorded-baseline"} & {w.code for w in measured.warnings}
    assert measured.delta.speedup == pytest.approx(
        measured.before.latency[0].p50_ms / measured.after.latency[0].p50_ms
    )


def test_several_models_and_files_for_ci(models: Path, data_dir: Path, tmp_path: Path) -> None:
    files = {"html": tmp_path / "r.html", "junit": tmp_path / "r.xml", "summary": tmp_path / "r.md"}
    gates = Gates(expressions=("accuracy>=1.01",))
    outcome = judge(models / "a", models / "b", data=data_dir, common={"gates": gates}, **files)
    assert len(outcome.reports) == 2
    assert outcome.report.exit_code == ExitCode.GATE
    assert all(path.stat().st_size > 100 for path in files.values())
    assert files["junit"].read_text().count("<failure") == 2
    with pytest.raises(UsageError, match="-o takes one model"):
        judge(models / "a", models / "b", data=data_dir, common={"out": tmp_path / "x"})


@pytest.mark.parametrize(
    ("options", "common", "error", "words"),
    [
        ({"split": "tset"}, {}, UsageError, "no split 'tset'"),
        ({}, {"device": "cuda:9"}, Exception, "cuda:9"),
    ],
)
def test_bad_requests(
    models: Path, data_dir: Path, options: dict, common: dict, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        judge(models / "a", data=data_dir, common=common, **options)


def test_limit_measures_fewer_rows(models: Path, data_dir: Path) -> None:
    report = judge(models / "a", data=data_dir, common={"limit": 7}).report
    assert report.after.quality is not None
    assert report.after.quality.accuracy.n == 7
    assert report.config["limit"].value == 7


def test_an_export_that_disagrees_is_exit_5_and_leaves_nothing(
    models: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporter.export

    def wrong(model, inputs, path, *, route=None):
        other = tiny.checkpoint("bert", seed=9)
        return real(other.model, inputs, path, route=route)

    monkeypatch.setattr(exporter, "export", wrong)
    with pytest.raises(ParityError) as raised:
        prune(models / "a", tmp_path / "out", data_dir)
    assert raised.value.exit_code == ExitCode.PARITY
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_head_is_refused(data_dir: Path, tmp_path: Path) -> None:
    made = tiny.untrained()
    made.model.bert.save_pretrained(tmp_path / "encoder")
    made.tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="no head for a task"):
        judge(tmp_path / "encoder", data=data_dir)
    with pytest.raises(InputError, match="no head for a task"):
        prune(tmp_path / "encoder", tmp_path / "out", data_dir)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_goes_through_prune_and_quantize(family: str, data_dir: Path, tmp_path: Path) -> None:
    model = tiny.saved(tmp_path / "model", family)
    pruned = prune(model, tmp_path / "pruned", data_dir).report
    assert pruned.after.size.parameters is not None
    assert pruned.before is not None
    assert pruned.before.size.parameters is not None
    assert pruned.after.size.parameters < pruned.before.size.parameters
    request = Request(
        stage="quantize",
        model=str(tmp_path / "pruned"),
        options=QuantizeOptions(),
        common=Common(out=tmp_path / "int8"),
    )
    small = life.run(request, Progress()).report
    assert small.parity is not None
    assert small.parity.passed
    assert [entry.stage for entry in small.lineage] == ["input", "prune", "quantize"]
    assert checkpoints.load(tmp_path / "int8").model_type == family


def test_a_recipe_takes_unchanged_stages_from_the_cache(models: Path, data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {models / 'a'}\ndata: {data_dir}\nstages:\n"
        "  - prune: {sparsity: 0.4, method: taylor, schedule: one-shot}\n  - quantize\n  - evaluate: {max-drop: 1.0}\n"
    )
    first = recipe.run(file, tmp_path / "one", False, Progress(), False)
    notes = Notes()
    second = recipe.run(file, tmp_path / "two", False, notes, False)
    assert sum("from the cache" in line for line in notes.lines) == 2
    assert isinstance(first, recipe.RecipeOutcome)
    assert isinstance(second, recipe.RecipeOutcome)
    assert second.path == tmp_path / "two" / "2-quantize"
    assert [r.stage for r in second.reports] == ["prune", "quantize", "evaluate"]
    for name in ("1-prune", "2-quantize"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert (one / "model.onnx").read_bytes() == (two / "model.onnx").read_bytes()
    file.write_text(file.read_text().replace("0.4", "0.2"))
    notes = Notes()
    recipe.run(file, tmp_path / "three", False, notes, False)
    assert not any("from the cache" in line for line in notes.lines)


def test_a_missed_gate_ends_a_recipe(models: Path, data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {models / 'a'}\ndata: {data_dir}\nstages:\n"
        "  - prune: {sparsity: 0.2, method: taylor, schedule: one-shot, gate: accuracy>=1.01}\n  - quantize\n"
    )
    outcome = recipe.run(file, tmp_path / "out", False, Progress(), False)
    assert isinstance(outcome, recipe.RecipeOutcome)
    assert outcome.report.exit_code == ExitCode.GATE
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1-prune"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [", "not YAML"),
        ("stages: []", "no list 'stages'"),
        ("stages: [{prun: {}}]", "did you mean 'prune'"),
        ("model: a\nstages: [{prune: {sparsety: 0.1}}]", "did you mean 'sparsity'"),
        ("model: a\nstages: [{prune: {sparsity: lots}}]", "sparsity"),
        ("model: a\nstages: [{prune: {max-drop: }}]", "'max-drop' has no value"),
        ("model: a\nstages: [{prune: {max-drop: true}}]", "max-drop: true is not a value"),
        ("model: a\nstages: [{prune: {gate: }}]", "'gate' has no value"),
        ("model: a\ndata:\nstages: [prune]", "'data' has no value"),
        ("stages: [{distill: {student: tiny}}]", "teacher is missing"),
        ("stages: [prune]", "names no 'model'"),
        (
            "stages: [{distill: {teacher: a, student: tiny}}, {distill: {teacher: a, student: tiny}}]",
            "only be the first",
        ),
        ("sed: 1\nstages: [prune]", "did you mean 'seed'"),
        ("stages: !!python/object/apply:os.system [echo]", "not YAML"),
    ],
)
def test_a_broken_recipe_is_found_before_anything_runs(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        recipe.read(file)


def test_the_chain_remembers_data_and_columns(models: Path, data_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in data_dir.glob("*.csv"):
        (data / file.name).write_text(file.read_text().replace("text,label", "sentence,intent", 1))
    columns = "text=sentence,label=intent"
    prune(models / "a", tmp_path / "p1", data, columns=columns)
    options = PruneOptions(sparsity=0.2, method="taylor", schedule="one-shot")
    for number in (1, 2):  # the second step has only the first one's report to go by
        source, out = tmp_path / f"p{number}", tmp_path / f"p{number + 1}"
        common = Common(out=out)
        life.run(Request(stage="prune", model=str(source), options=options, common=common), Progress())
        report = io.read(out)
        assert report.config["columns"].value == columns
        assert report.config["columns"].origin == "model"
        assert report.data is not None
        assert report.data.ref == str(data)


def test_one_file_is_judged_whole_but_not_the_rows_a_model_was_trained_on(
    models: Path, data_dir: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.csv"
    one.write_bytes((data_dir / "train.csv").read_bytes())
    trained = prune(models / "a", tmp_path / "pruned", one).report
    assert trained.data is not None
    whole = judge(models / "a", data=one).report
    assert whole.data is not None
    assert whole.after.quality is not None
    assert whole.data.rows == {"test": 96}
    assert (whole.after.quality.accuracy.n, whole.after.quality.accuracy.split) == (96, "test")
    moved = tmp_path / "moved.csv"
    moved.write_bytes(one.read_bytes())
    # One of the models is enough: all of them are judged on the same rows.
    for names, options in (
        ([tmp_path / "pruned"], {}),
        ([models / "a", tmp_path / "pruned"], {}),
        ([models / "a"], {"baseline": str(tmp_path / "pruned")}),
    ):
        held_out = judge(*names, data=moved, **options).report
        assert held_out.data is not None
        assert held_out.data.fingerprint == trained.data.fingerprint
        assert held_out.after.quality is not None
        assert held_out.after.quality.accuracy.n == trained.data.rows["test"]
