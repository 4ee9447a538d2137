from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from kdcli.errors import ExitCode
from kdcli.report.schema import Report
from tests.report.reports import bare, full, with_gates


@pytest.mark.parametrize(
    ("gates", "parity", "expected"),
    [
        ((), None, ExitCode.OK),
        ((True, True), True, ExitCode.OK),
        ((True, False), True, ExitCode.GATE),
        ((True,), False, ExitCode.PARITY),
        # A wrong export is the graver news: the numbers of the gates were measured on it.
        ((False,), False, ExitCode.PARITY),
    ],
)
def test_the_report_owns_the_verdict(
    gates: tuple[bool, ...], parity: bool | None, expected: ExitCode
) -> None:
    assert with_gates(bare(), *gates, parity=parity).verdict == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    content = full().model_dump()
    content["after"]["quality"]["accuracy"]["value"] = value
    with pytest.raises(ValidationError, match="finite"):
        Report.model_validate(content)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="forbidden"):
        Report.model_validate(full().model_dump() | {"surprise": 1})


def test_the_fields_are_those_of_the_contract_in_its_order() -> None:
    contract = (
        "schema_version kind complete exit_code kdcli_version stage command config model data before after delta "
        "method parity gates lineage environment timings warnings artifacts created_at"
    )
    assert list(Report.model_fields) == contract.split()
