"""How sure a metric is, and a difference of two: the bootstrap, for any metric that is a function of sums over rows.

A resample of N rows is N counts, how often each row was drawn, so the sums of R resamples are one product of the
counts (R, N) with what each row adds (N, K), and a thousand resamples of a micro F1 take no longer than one. A metric
that is no such function (ranks, areas under curves) goes in by its influence function, the derivative of the metric
with respect to the weight of each row: its resamples are then linear ones, right to first order in 1/sqrt(N), which
is the order of the error that they tell.

Two models are compared on the same resamples: what is hard about a row is hard for both and cancels.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13 (standard errors, percentile
intervals), section 21.3 (influence functions); Koehn 2004, "Statistical Significance Tests for Machine Translation
Evaluation", section 4 (paired resamples).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kdcli.report.schema import MetricValue

RESAMPLES = 2000
"""The error of a standard error is then 1.6%; the smallest p-value 0.001."""
_SEED = 20260101
_DRAWN_AT_ONCE = 2_000_000  # counts of one product, 16 MB


@dataclass(frozen=True)
class Statistic:
    """A metric as a function of sums over rows.

    Args:
        sums: (N, K) what every row adds.
        of: (R, K) sums of R resamples to their R values.
        n: Rows or queries that count; None: all rows.
        higher_is_better: As in a report.
    """

    sums: np.ndarray
    of: Callable[[np.ndarray], np.ndarray]
    n: int | None = field(default=None, kw_only=True)
    higher_is_better: bool = field(default=True, kw_only=True)

    @property
    def value(self) -> float:
        """Of the rows themselves."""
        return float(self.of(self.sums.sum(0, dtype=np.float64)[None])[0])


def mean(rows: np.ndarray, **facts: bool) -> Statistic:
    """The mean of one value (N,) a row, as a statistic."""
    return Statistic(np.stack([rows, np.ones(len(rows))], 1), lambda s: ratio(s[:, 0], s[:, 1]), **facts)


def linear(value: float, influence: np.ndarray) -> Statistic:
    """A metric by its influence function.

    Args:
        value: Of all rows.
        influence: (N,) derivatives of the metric with respect to the weights of the rows, at weights of 1.
    """
    # They sum to 0 for a metric that does not change when every row is doubled; rounding is taken out.
    return Statistic((influence - influence.mean())[:, None], lambda s: value + s[:, 0])


def correlation(value: float, influence: np.ndarray) -> Statistic:
    """A correlation by its influence function, linear on Fisher's scale artanh(r), so that it stays within -1 and 1.

    Source: Fisher 1921.
    """
    if abs(value) >= 1 - 1e-12:
        return linear(value, np.zeros(len(influence)))
    steep = (influence - influence.mean()) / (1 - value**2)
    return Statistic(steep[:, None], lambda s: np.tanh(np.arctanh(value) + s[:, 0]))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)


def resampled(
    statistics: Mapping[str, Statistic], groups: np.ndarray | None = None, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Values (R,) of statistics of the same N rows, all on the same R resamples, which a fixed seed draws.

    Args:
        statistics: By name.
        groups: (N,) rows that belong together, such as those of a query: they are drawn together, because they are
            no independent rows. None: every row is on its own.
        resamples: R.
    """
    sums = np.concatenate([one.sums for one in statistics.values()], 1, dtype=np.float64)
    if groups is not None:
        where = np.unique(groups, return_inverse=True)[1]
        sums = np.stack([np.bincount(where, weights=column) for column in sums.T], 1)
    n = len(sums)
    generator = np.random.default_rng(_SEED)
    parts, step = [], max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, resamples, step):
        many = min(step, resamples - first)
        drawn = generator.integers(0, n, (many, n)) + n * np.arange(many)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * n).reshape(many, n)
        parts.append(counts.astype(np.float64) @ sums)
    all_sums = np.concatenate(parts)
    ends = np.cumsum([one.sums.shape[1] for one in statistics.values()])[:-1]
    columns = np.split(all_sums, ends, axis=1)
    return {name: one.of(part) for (name, one), part in zip(statistics.items(), columns, strict=True)}


def measured(
    statistics: Mapping[str, Statistic], rows: int, split: str, groups: np.ndarray | None = None
) -> dict[str, MetricValue]:
    """Every statistic with its standard error and 95% percentile interval, as a report has them.

    Both are None where all resamples agree: that is no proof of certainty, only of too few rows of another kind.

    Args:
        statistics: By name.
        rows: N.
        split: Name of the rows.
        groups: As in :func:`resampled`.
    """
    found = {}
    for name, values in resampled(statistics, groups).items():
        one, spread = statistics[name], float(values.std())
        low, high = (float(bound) for bound in np.quantile(values, (0.025, 0.975)))
        sure = spread < 1e-12
        found[name] = MetricValue(
            value=one.value,
            stderr=None if sure else spread,
            ci95=None if sure else (low, high),
            n=rows if one.n is None else one.n,
            split=split,
            higher_is_better=one.higher_is_better,
        )
    return found


@dataclass(frozen=True)
class PairedDifference:
    """The second model's metric minus the first's, on the same resamples."""

    difference: float
    ci95: tuple[float, float]  # percentiles
    p_value: float  # two-sided, that the true difference is 0; at least 2 / (R + 1), 1 for equal answers


def paired(
    before: Statistic, after: Statistic, groups: np.ndarray | None = None, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compare one metric of two models by the paired bootstrap.

    The p-value is twice the smaller share of resamples on which the difference is not above 0, or not below 0; the
    data themselves count as one more resample, so that it is never 0.
    """
    values = resampled({"before": before, "after": after}, groups, resamples)
    # Sums in another order leave rounding where the models answer alike.
    moved = values["after"] - values["before"]
    moved[np.abs(moved) < 1e-12] = 0.0
    low, high = (float(bound) for bound in np.quantile(moved, (0.025, 0.975)))
    tail = (1 + min(int((moved <= 0).sum()), int((moved >= 0).sum()))) / (resamples + 1)
    return PairedDifference(after.value - before.value, (low, high), min(1.0, 2 * tail))
