"""What a finished stage shows and returns."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from tests.cli import fakes
from tests.cli.conftest import Call
from tests.cli.fakes import Outcome, Recorder


def test_a_table_on_stderr_and_the_path_on_stdout(call: Call) -> None:
    result = call("prune", "model")
    assert (result.code, result.out) == (0, "out/made\n")
    for said in (
        "accuracy",
        "macro F1",
        "parameters",
        "multiply-accumulates",
        "model.onnx",
        "latency p50, onnx, batch 32",
    ):
        assert said in result.err
    assert "2.00x faster" in result.err
    assert "4.00x smaller" in result.err
    assert "within noise (p = 0.5)" in result.err
    assert result.err.rstrip().endswith("done in 0s, out/made")
    assert "\033" not in result.err


def test_slower_is_said_in_words(call: Call, recorder: Recorder) -> None:
    recorder.outcome = Outcome(
        Path("out/made"),
        fakes.report(after=fakes.measurement(0.9, 8_000_000, 3.0), warnings=("watch \x1b[2Jout",)),
    )
    err = call("prune", "model").err
    assert "1.50x slower" in err
    assert "2.00x larger" in err
    assert "warning: watch \\x1b[2Jout" in err


def test_quiet_says_only_what_went_wrong(call: Call, recorder: Recorder) -> None:
    assert call("prune", "model", "-q").err == ""
    recorder.outcome = Outcome(Path("out/kept"), fakes.report(exit_code=4, gates=(("accuracy>=0.9", False),)))
    err = call("prune", "model", "-q").err
    assert err.splitlines() == ["kdcli prune: gate missed: accuracy>=0.9", "  the output is kept in out/kept"]


def test_judging_alone_keeps_no_output(call: Call, recorder: Recorder) -> None:
    missed = fakes.report(exit_code=4, gates=(("accuracy>=0.9", False),)).model_copy(
        update={"stage": "evaluate"}
    )
    recorder.outcome = Outcome(Path("model"), missed)
    assert call("evaluate", "model", "-q").err.splitlines() == ["kdcli evaluate: gate missed: accuracy>=0.9"]


def test_verbose_shows_more_rows_and_times(call: Call) -> None:
    brief, long = call("prune", "model").err, call("prune", "model", "-v").err
    assert "throughput" in long
    assert "throughput" not in brief


def test_zeros_show_what_they_are_worth_in_an_archive(call: Call, recorder: Recorder) -> None:
    assert "gzipped" not in call("prune", "model").err
    after = fakes.measurement()
    after.size.nonzero_parameters, after.size.onnx_gzip_bytes = 600_000, 2_000_000
    recorder.outcome = Outcome(Path("out/made"), fakes.report(after=after))
    err = call("prune", "model").err
    (row,) = [line for line in err.splitlines() if "gzipped" in line]
    assert row.split("gzipped")[1].split() == ["2.86", "MiB", "1.91", "MiB", "1.50x", "smaller"]
    assert "non-zero parameters" in err
    assert "throughput" not in err


def test_a_missed_gate_names_the_output_on_stderr_alone(call: Call, recorder: Recorder) -> None:
    gates = (("accuracy>=0.9", False), ("speedup>=1", True), ("onnx_bytes<=10", False))
    recorder.outcome = Outcome(Path("out/kept"), fakes.report(exit_code=4, gates=gates))
    result = call("prune", "model")
    assert (result.code, result.out) == (4, "")
    assert "gate MISSED: accuracy>=0.9 (is 0.88)" in result.err
    assert "gate met: speedup>=1" in result.err
    assert "gates missed: accuracy>=0.9; onnx_bytes<=10" in result.err
    assert "out/kept" in result.err


def test_json_is_the_report_even_when_a_gate_was_missed(call: Call, recorder: Recorder) -> None:
    assert json.loads(call("prune", "model", "--json").out) == fakes.report().model_dump(mode="json")
    recorder.outcome = Outcome(Path("out/kept"), fakes.report(exit_code=4, gates=(("accuracy>=0.9", False),)))
    result = call("prune", "model", "--json")
    assert result.code == 4
    assert json.loads(result.out)["gates"][0]["passed"] is False


def test_an_export_that_differs_is_exit_5(call: Call, recorder: Recorder) -> None:
    recorder.outcome = Outcome(Path("out/kept"), fakes.report(exit_code=5))
    result = call("quantize", "model", "--scheme", "dynamic-int8")
    assert (result.code, result.out) == (5, "")
    assert "does not agree" in result.err


def test_dry_run_prints_the_plan_and_runs_nothing(call: Call, recorder: Recorder, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = call("prune", "model", "-n")
    assert (result.code, result.out) == (0, "")
    assert "would run prune" in result.err
    result = call("prune", "model", "--dry-run", "--json")
    assert json.loads(result.out) == {"kind": "kdcli.plan", "stage": "prune"}
    assert "would run prune" in result.err
    assert sorted(tmp_path.iterdir()) == before
    assert len(recorder.requests) == 2


def test_several_models_are_one_table_with_the_pareto_set(call: Call, recorder: Recorder) -> None:
    reports = [
        fakes.report("evaluate", source="out/a", after=fakes.measurement(0.9, 4_000_000, 2.0)),
        fakes.report("evaluate", source="out/b", after=fakes.measurement(0.9, 1_000_000, 1.0)),
        fakes.report("evaluate", source="org/c", after=fakes.measurement(0.95, 9_000_000, 4.0)),
    ]
    recorder.outcome = Outcome(Path("out/a"), reports[0], reports)
    result = call("evaluate", "model", "model", "model")
    rows = {line.split()[0]: line for line in result.err.splitlines() if line.startswith(("out/", "org/"))}
    assert [name for name, line in rows.items() if line.endswith("*")] == ["out/b", "org/c"]
    assert set(rows) == {"out/a", "out/b", "org/c"}
    assert result.out.splitlines() == ["out/a", "out/b", "org/c"]
    documents = json.loads(call("evaluate", "model", "model", "model", "--json").out)
    assert [one["model"]["source"] for one in documents] == ["out/a", "out/b", "org/c"]


def test_warnings_of_libraries_are_counted(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(request: object, progress: object, resolved: object) -> Outcome:
        warnings.warn("old API", DeprecationWarning, stacklevel=1)
        warnings.warn("odd number", UserWarning, stacklevel=1)
        return Outcome(Path("out/made"), fakes.report())

    monkeypatch.setattr("kdcli.run.life.run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = call("prune", "model")
    assert result.code == 0
    assert "2 warnings of libraries not shown" in result.err
    assert "old API" not in result.err
