"""flag > environment > file > default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.cli.fakes import Recorder

TOML = """
data = "reviews"
seed = 3
max_drop = 0.02
offline = true

[prune]
structure = "heads"
sparsity = 0.25
gate = ["accuracy>=0.8", "speedup>=1"]
set = { steps = 4 }

[quantize]
scheme = "dynamic-int8"
"""


def test_the_nearest_source_wins_and_is_recorded(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("kdcli.toml").write_text(TOML)
    monkeypatch.setenv("KDCLI_SEED", "5")
    monkeypatch.setenv("KDCLI_STRUCTURE", "neurons")
    result = call("prune", "model", "--structure", "weights")
    assert result.code == 0, result.err
    request = recorder.request
    assert request.options.structure == "weights"  # type: ignore[union-attr]
    assert request.options.sparsity == 0.25  # type: ignore[union-attr]
    common = request.common
    assert (common.data, common.seed, common.offline, common.force) == ("reviews", 5, True, False)
    assert common.settings == {"steps": "4"}
    assert common.gates.max_drop == 0.02
    assert common.gates.expressions == ("accuracy>=0.8", "speedup>=1")
    expected = {
        "structure": "flag",
        "seed": "environment",
        "data": "file",
        "sparsity": "file",
        "max_drop": "file",
        "force": "default",
    }
    assert {name: request.origins[name] for name in expected} == expected


def test_a_switch_in_the_file_can_be_switched_off(call: Call, recorder: Recorder) -> None:
    Path("kdcli.toml").write_text(TOML)
    call("prune", "model", "--no-offline")
    assert recorder.request.common.offline is False


def test_lists_in_variables_are_separated_by_spaces(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCLI_GATE", "accuracy>=0.8 speedup>=1")
    monkeypatch.setenv("KDCLI_QUIET", "1")
    result = call("prune", "model")
    assert recorder.request.common.gates.expressions == ("accuracy>=0.8", "speedup>=1")
    assert result.err == ""


def test_pyproject_is_read_unless_there_is_a_kdcli_toml(call: Call, recorder: Recorder) -> None:
    Path("pyproject.toml").write_text('[project]\nname = "x"\n[tool.kdcli]\nseed = 8\n')
    call("prune", "model")
    Path("kdcli.toml").write_text("seed = 9\n")
    call("prune", "model")
    assert [request.common.seed for request in recorder.requests] == [8, 9]


def test_a_pyproject_of_others_is_not_our_business(call: Call) -> None:
    Path("pyproject.toml").write_text("[project\n")
    assert call("prune", "model").code == 0


def test_an_exclusive_option_said_nearer_replaces_the_one_of_the_file(call: Call, recorder: Recorder) -> None:
    Path("kdcli.toml").write_text(TOML)
    assert call("prune", "model", "--budget", "0.6").code == 0
    assert (recorder.request.options.budget, recorder.request.options.sparsity) == (0.6, None)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sed = 1\n", "kdcli.toml: unknown key 'sed': did you mean 'seed'?"),
        ("[prune]\nsparsty = 0.5\n", "[prune] unknown key 'sparsty': did you mean 'sparsity'?"),
        ("[prun]\nsparsity = 0.5\n", "unknown key 'prun': did you mean 'prune'?"),
        ("structure = 'heads'\n", "unknown key 'structure'"),
        ("[prune]\nstructure = 'head'\n", "did you mean 'heads'?"),
        ("[prune]\nsparsity = 'much'\n", "sparsity: 'much' is not a number"),
        ("seed = 2026-01-01\n", "seed"),
        ("seed = \n", "kdcli.toml is not valid TOML"),
    ],
)
def test_a_wrong_file_is_bad_input(call: Call, recorder: Recorder, content: str, said: str) -> None:
    Path("kdcli.toml").write_text(content)
    result = call("prune", "model")
    assert (result.code, result.out, recorder.requests) == (3, "", [])
    assert said in result.err


def test_help_needs_no_valid_file(call: Call) -> None:
    Path("kdcli.toml").write_text("seed = \n")
    assert call("prune", "--help").code == 0


def test_a_file_that_is_not_text_is_bad_input(call: Call) -> None:
    Path("kdcli.toml").write_bytes(b"seed = 1 # \xff\n")
    assert call("prune", "model").code == 3


def test_other_commands_pass_over_keys_that_they_do_not_have(call: Call) -> None:
    Path("kdcli.toml").write_text(TOML)
    assert call("list", "students").code == 0


@pytest.mark.parametrize(
    "flag", ["max-drop", "min-speedup", "max-size", "gate", "baseline", "data", "columns", "split", "limit"]
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_drops_no_gate(
    flag: str, value: str, call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "KDCLI_" + flag.upper().replace("-", "_")
    monkeypatch.setenv(variable, value)
    result = call("evaluate", "model")
    assert result.code in (2, 3)  # 3: a model reference of one blank
    assert not recorder.requests
    if not value:
        assert f"{variable} is set, but empty" in result.err


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("KDCLI_MAXDROP", "KDCLI_MAX_DROP"),
        ("kdcli_max_drop", "KDCLI_MAX_DROP"),
        ("KDCLI_MIN_SPEED_UP", "KDCLI_MIN_SPEEDUP"),
        ("KDCLI_GATES", "KDCLI_GATE"),
        ("KDCLI_COLUMN", "KDCLI_COLUMNS"),
    ],
)
def test_a_misspelt_variable_drops_no_gate(
    variable: str, meant: str, call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "0.1")
    result = call("evaluate", "model")
    assert result.code == 2
    assert f"kdcli does not read {variable}: did you mean {meant}?" in result.err
    assert not recorder.requests


def test_variables_of_others_are_let_be(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCLI_DATA_DIR", "mine")
    monkeypatch.setenv("KDCLI_MAXDROP", "0.1")
    monkeypatch.setenv("KDCLI_MAX_DROP", "0.3")  # the right name stands in for the wrong one, as a flag does
    assert call("evaluate", "model").code == 0
    assert recorder.request.common.gates.max_drop == 0.3


def test_a_flag_stands_in_for_an_empty_variable(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCLI_MAX_DROP", "")
    monkeypatch.setenv("KDCLI_SEED", "")  # judges nothing
    assert call("evaluate", "model", "--max-drop", "0.1").code == 0
    assert recorder.request.common.gates.max_drop == 0.1


@pytest.mark.parametrize(
    "line",
    [
        'max-drop = ""',
        "max-drop = true",  # not a drop of 1
        "max-drop = false",  # not a drop of 0
        "max-drop = [0.1]",
        "max-size = false",
        'min-speedup = " "',
        'gate = ""',
        "gate = false",
        "gate = {}",
        'gate = [""]',
        'data = ""',
        "data = false",
    ],
)
def test_a_value_that_is_none_drops_no_gate(line: str, call: Call, recorder: Recorder) -> None:
    Path("kdcli.toml").write_text(line)
    result = call("evaluate", "model")
    assert result.code in (2, 3), result.err
    assert not recorder.requests


def test_one_gate_needs_no_list(call: Call, recorder: Recorder) -> None:
    Path("kdcli.toml").write_text('gate = "accuracy >= 0.9"')
    assert call("evaluate", "model").code == 0
    assert recorder.request.common.gates.expressions == ("accuracy >= 0.9",)
