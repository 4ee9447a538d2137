from __future__ import annotations

import math

import pytest

from kdcli.errors import UsageError
from kdcli.report.gates import GENERAL, Expression, check_drop, judge, parse_expression, parse_size, value_of
from kdcli.request import Gates
from tests.report.reports import delta, measurement

NAMES = ("accuracy", "macro_f1", "ece", *GENERAL)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("4096", 4096), ("20MiB", 20 * 2**20), ("1.5GB", 1_500_000_000), (" 2 kib ", 2048), ("0", 0), ("7b", 7)],
)
def test_sizes(given: str, expected: int) -> None:
    assert parse_size(given) == expected


@pytest.mark.parametrize("given", ["", "MiB", "-1", "1e3", "20 Mbit", "nan", "1.MB", "1 2"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(given)


def test_a_size_keeps_every_digit() -> None:
    assert parse_size("9007199254740993") == 9007199254740993
    assert parse_size("9" * 400) == int("9" * 400)


@pytest.mark.parametrize("given", ["ece<=5", "accuracy>=90", "agreement>=99.5"])
def test_a_share_in_percent_is_refused(given: str) -> None:
    """ece<=5 held whatever the model answers."""
    with pytest.raises(UsageError, match="is at most 1"):
        parse_expression(given)


def test_expressions_are_taken_apart() -> None:
    assert parse_expression(" accuracy >= 0.9 ") == Expression("accuracy", ">=", 0.9)
    assert parse_expression("onnx_bytes<20MiB") == Expression("onnx_bytes", "<", 20 * 2.0**20)


@pytest.mark.parametrize(
    "given", ["accuracy", "accuracy=>1", "accuracy>=", "accuracy>=nan", "ece<=inf", "drop<x", ""]
)
def test_what_is_no_gate_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        parse_expression(given)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        parse_expression("acuracy>=0.9")


@pytest.mark.parametrize("sign", [">=", "<=", ">", "<", "=="])
@pytest.mark.parametrize("value", [None, math.nan])
def test_missing_and_nan_never_pass(sign: str, value: float | None) -> None:
    assert not Expression("accuracy", sign, 0.0).holds(value)


@pytest.mark.parametrize(
    ("sign", "below", "equal", "above"),
    [
        (">=", False, True, True),
        ("<=", True, True, False),
        (">", False, False, True),
        ("<", True, False, False),
        ("==", False, True, False),
    ],
)
def test_operators(sign: str, below: bool, equal: bool, above: bool) -> None:
    expression = Expression("accuracy", sign, 0.5)
    assert [expression.holds(value) for value in (0.4, 0.5, 0.6)] == [below, equal, above]


def test_every_name_has_a_value() -> None:
    known = delta(accuracy=-0.1, size_ratio=2.0, speedup=3.0, agreement=0.9, p_value=0.5)
    values = {name: value_of(name, measurement(), known) for name in NAMES}
    assert values["accuracy"] == 0.9
    assert values["drop"] == 0.1
    assert (values["p50_ms"], values["p99_ms"]) == (1, 3)
    assert values["throughput_per_s"] == 32_000
    assert None not in values.values()


def test_every_name_that_is_not_measured_fails() -> None:
    nothing = measurement(
        None,
        batches=(),
        **dict.fromkeys(
            ("parameters", "nonzero_parameters", "checkpoint_bytes", "onnx_bytes", "onnx_gzip_bytes")
        ),
    )
    nothing = nothing.model_copy(update={"compute": nothing.compute.model_copy(update={"macs": None})})
    for sign in (">=", "<="):
        gates = judge(Gates(expressions=tuple(f"{name}{sign}0" for name in NAMES)), None, nothing, delta())
        assert len(gates) == len(NAMES)
        assert not any(gate.passed for gate in gates)
        assert all(gate.value is None for gate in gates)


def test_throughput_falls_back_to_the_largest_batch() -> None:
    assert value_of("throughput_per_s", measurement(batches=(1, 8)), delta()) == 8000
    assert value_of("p50_ms", measurement(batches=(8,)), delta()) is None


def test_flags_become_gates_in_order() -> None:
    limits = Gates(max_drop=0.01, min_speedup=2.0, max_size_bytes=999, expressions=("ece<0.1",))
    before = measurement()
    gates = judge(limits, before, measurement(), delta(accuracy=-0.02, speedup=2.0))
    assert [(gate.name, gate.passed) for gate in gates] == [
        ("max-drop", False),
        ("min-speedup", True),
        ("max-size", False),
        ("ece<0.1", True),
    ]
    assert [gate.value for gate in gates] == [0.02, 2.0, 1000.0, 0.05]


def test_a_drop_of_exactly_the_limit_is_allowed_and_a_gain_always() -> None:
    limits = Gates(max_drop=0.01)
    rounding = 0.89 - 0.9
    assert -rounding > 0.01
    assert judge(limits, None, measurement(), delta(accuracy=rounding))[0].passed
    assert judge(limits, None, measurement(), delta(accuracy=0.2))[0].passed
    assert not judge(limits, None, measurement(), delta(accuracy=-0.0101))[0].passed


def test_a_drop_above_1_is_for_metrics_in_the_unit_of_the_labels() -> None:
    for drop, metric in ((1.0, None), (0.5, "spearman"), (250.0, "rmse"), (2.0, "log_loss")):
        check_drop(Gates(max_drop=drop), metric)
        check_drop(Gates(expressions=(f"drop<={drop}", "rmse<=60")), metric)
    check_drop(Gates(), None)
    for metric in (None, "accuracy", "spearman", "ndcg_at_10"):
        with pytest.raises(UsageError, match=r"--max-drop 2: a drop of .* is at most 1") as refused:
            check_drop(Gates(max_drop=2.0), metric)
        assert "write 0.02 for 2 %" in str(refused.value.hint)
        with pytest.raises(UsageError, match=r"the gate 'drop<=2': a drop of .* is at most 1"):
            check_drop(Gates(expressions=("accuracy>=0.5", "drop<=2")), metric)


def test_no_gates_asked_for_is_an_empty_list() -> None:
    assert judge(Gates(), None, measurement(), delta()) == []
