"""Two measurements against each other, and the rows they are of."""

from __future__ import annotations

import numpy as np
import pytest

from kdcli.data.sources import Dataset
from kdcli.errors import UsageError
from kdcli.inputs import picked
from kdcli.inputs.text import Rows
from kdcli.measure import comparison
from kdcli.report import gates
from kdcli.request import Gates
from kdcli.tasks.classification import CLASSIFICATION
from tests.report.reports import measurement


def test_ratios_are_before_over_after() -> None:
    # 4 ms and 1 ms, 3000 and 1000 bytes by hand: four times as fast, three times as small.
    before, after = measurement(0.9, onnx_bytes=3000), measurement(0.88, onnx_bytes=1000)
    before.latency[0].p50_ms, after.latency[0].p50_ms = 4.0, 1.0
    before.latency[1].p50_ms, after.latency[1].p50_ms = 7.0, 70.0  # batch 32 has no say
    delta = comparison.compare(before, after)
    assert delta.speedup == pytest.approx(4)
    assert delta.size_ratio == pytest.approx(3)
    assert delta.main == pytest.approx(-0.02)
    asked = Gates(min_speedup=3, expressions=("size_ratio>=2.5", "drop<=0.025", "p50_ms<=1"))
    assert [gate.passed for gate in gates.judge(asked, before, after, delta)] == [True] * 4
    in_torch = [one.model_copy(update={"runtime": "torch"}) for one in before.latency]
    assert comparison.compare(before.model_copy(update={"latency": in_torch}), after).speedup is None
    back = comparison.compare(after, before)
    assert back.speedup == pytest.approx(1 / 4)
    assert back.size_ratio == pytest.approx(1 / 3)
    assert {w.code for w in comparison.honest(back, after, before)} == {"slower", "bigger"}
    assert {w.code for w in comparison.honest(delta, before, after)} == set()


def answers(n: int, lost: int, won: int, wrong: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of two models of two classes: ``wrong`` rows that both miss, ``lost`` and ``won`` that one does."""
    labels = np.zeros(n, dtype=np.int64)
    before, after = labels.copy(), labels.copy()
    before[:wrong] = after[:wrong] = 1
    after[wrong : wrong + lost] = 1
    before[wrong + lost : wrong + lost + won] = 1
    return before, after, labels


@pytest.mark.parametrize(
    ("lost", "won", "warned"),
    [
        (
            30,
            8,
            True,
        ),  # p = 0.0005 by scipy.stats.binomtest(8, 38); two unpaired errors of 0.0038 see nothing
        (10, 5, False),  # p = 0.3
        (0, 5, False),
        (8, 30, False),  # better
    ],
)
def test_a_fall_is_judged_row_by_row(lost: int, won: int, warned: bool) -> None:
    n = 4500
    old, new, labels = answers(n, lost, won)
    before, after = measurement((old == labels).mean()), measurement((new == labels).mean())
    for one in (before, after):
        assert one.quality is not None
        value = one.quality.accuracy.value
        one.quality.accuracy.n, one.quality.accuracy.stderr = n, (value * (1 - value) / n) ** 0.5
    delta = comparison.row_by_row(
        comparison.compare(before, after), CLASSIFICATION.compare(np.eye(2)[old], np.eye(2)[new], labels)
    )
    assert (delta.lost, delta.won) == (lost, won)
    assert delta.main == pytest.approx((won - lost) / n)
    found = comparison.honest(delta, before, after)
    assert ("worse" in {w.code for w in found}) == warned
    if warned:
        assert delta.p_value == pytest.approx(0.00047, abs=0.00001)
        assert delta.ci95 is not None
        assert delta.ci95[1] < 0
        assert not comparison.fell(
            delta.model_copy(update={"p_value": None, "ci95": None}), before, after
        )  # what was said before


def test_a_record_has_no_speed_and_counts_for_its_own_rows_only() -> None:
    recorded, now = measurement(0.967), measurement(0.517)
    assert recorded.quality is not None
    assert now.quality is not None
    for first, second, same in (("a", "a", True), ("a", "b", False), (None, "a", False), (None, None, False)):
        recorded.quality.rows_sha256, now.quality.rows_sha256 = first, second
        before = comparison.from_record(recorded, now)
        delta = comparison.compare(before, now)
        assert delta.speedup is None
        assert delta.size_ratio == 1
        assert (delta.main is not None) == same
        warnings, reasons = comparison.of_record(recorded, before, "first")
        assert {w.code for w in warnings} == {"recorded-baseline"} | (set() if same else {"other-rows"})
        asked = Gates(max_drop=0.5 if same else 0.02, min_speedup=1)
        drop, speed = gates.judge(asked, before, now, delta, reasons)
        assert drop.passed == same
        assert not speed.passed
        assert speed.reason is not None
        assert "--baseline first" in speed.reason
        assert same or (drop.reason is not None and "--baseline first" in drop.reason)


def data(test: Rows, validation: Rows | None = None) -> Dataset:
    train = Rows(["x", "y"], None, ["a", "b"])
    splits = {"train": train, "validation": validation or train} | ({"test": test} if test else {})
    return Dataset("d", splits, "f", ["a", "b"])


def test_rows_are_known_by_their_content() -> None:
    first = Rows(["one", "two", "three"], None, ["a", "b", "a"])
    known = picked.pick(data(first), None, None)
    assert known.split == "test"
    turned = Rows(["three", "one", "two"], None, ["a", "a", "b"])
    assert picked.pick(data(turned), None, None).sha256 == known.sha256
    for other in (
        Rows(["one", "two", "three!"], None, ["a", "b", "a"]),
        Rows(["one", "two", "three"], None, ["a", "b", "b"]),
        Rows(["one", "two", "three"], ["", "", ""], ["a", "b", "a"]),
        Rows(["one", "two"], None, ["a", "b"]),
        Rows(["one", "two", "three", "three"], None, ["a", "b", "a", "a"]),
    ):
        assert picked.pick(data(other), None, None).sha256 != known.sha256
    # With a limit the same rows of the same data are drawn, whatever a model makes of them.
    limited = picked.pick(data(first), None, 2)
    assert limited.sha256 == picked.pick(data(first), None, 2).sha256 != known.sha256
    assert len(limited.at) == 2
    with pytest.raises(UsageError, match="no split 'tset'"):
        picked.pick(data(first), "tset", None)
