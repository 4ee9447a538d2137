"""The bootstrap of sums: standard errors, intervals and paired comparisons of known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from kdcli.tasks import intervals

# A standard error from R resamples is known to 1 / sqrt(2 R): 1.6% with 2,000.
FOUR_SIGMA = 4 / np.sqrt(2 * intervals.RESAMPLES)


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_n() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=300)
    found = intervals.measured({"mean": intervals.mean(x)}, 300, "test")["mean"]
    assert found.value == pytest.approx(x.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(x.std() / np.sqrt(300), rel=FOUR_SIGMA)
    assert found.ci95 is not None
    # A percentile of 2,000 is known to about 0.06 standard errors.
    for bound, sign in zip(found.ci95, (-1, 1), strict=True):
        assert bound == pytest.approx(x.mean() + sign * 1.96 * x.std() / np.sqrt(300), abs=0.3 * found.stderr)


def test_rows_of_one_group_are_drawn_together() -> None:
    values = np.random.default_rng(0).normal(size=100)
    groups = np.repeat(np.arange(100), 4)
    copies = {"mean": intervals.mean(values[groups])}
    alone = intervals.measured({"mean": intervals.mean(values)}, 100, "t")["mean"]
    assert intervals.measured(copies, 400, "t", groups)["mean"].stderr == pytest.approx(
        alone.stderr, rel=1e-9
    )
    half = intervals.measured(copies, 400, "t")["mean"].stderr
    assert half == pytest.approx(float(alone.stderr or 0) / 2, rel=2 * FOUR_SIGMA)


def test_numbers_do_not_depend_on_how_many_resamples_one_product_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = {"mean": intervals.mean(np.random.default_rng(0).normal(size=50))}
    whole = intervals.resampled(x)["mean"]
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 1)
    assert np.allclose(intervals.resampled(x)["mean"], whole, atol=1e-12)


def test_no_error_is_claimed_where_all_resamples_agree() -> None:
    found = intervals.measured({"mean": intervals.mean(np.ones(20))}, 20, "test")["mean"]
    assert (found.value, found.stderr, found.ci95) == (1.0, None, None)


def test_equal_answers_are_no_difference() -> None:
    x = np.random.default_rng(0).normal(size=70) * 1e3
    pair = intervals.paired(intervals.mean(x), intervals.mean(x.copy()))
    assert (pair.difference, pair.ci95, pair.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_what_both_models_share_cancels() -> None:
    generator = np.random.default_rng(0)
    hard, gain = generator.normal(size=400) * 10, generator.normal(0.3, 1, 400)
    pair = intervals.paired(intervals.mean(hard), intervals.mean(hard + gain))
    error = gain.std() / 20
    assert pair.ci95[0] == pytest.approx(gain.mean() - 1.96 * error, abs=0.3 * error)
    assert pair.ci95[1] == pytest.approx(gain.mean() + 1.96 * error, abs=0.3 * error)
    assert pair.p_value == 2 / (intervals.RESAMPLES + 1)  # 6 standard errors: as small as it gets


def test_p_values_of_equally_good_models_are_below_5_percent_in_5_percent_of_the_cases() -> None:
    generator = np.random.default_rng(0)
    cases = 200
    found = [
        intervals.paired(
            *(intervals.mean(generator.normal(size=60)) for _ in range(2)), resamples=500
        ).p_value
        for _ in range(cases)
    ]
    # The bootstrap of 60 rows divides by N and not N - 1, and 500 resamples are coarse: 5.5% is what theory gives.
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.055, abs=4 * np.sqrt(0.055 * 0.945 / cases))
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / cases))
