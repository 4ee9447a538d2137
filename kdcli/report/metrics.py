"""What reports call a metric and how they write its numbers: the one table that every renderer asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["share", "coefficient", "open"]
"""A share is in [0, 1] and told in points of a hundred; a coefficient is at most 1 and told as it is; the rest has the
unit of the data or none, and no upper end."""


@dataclass(frozen=True)
class Metric:
    """How one metric is shown."""

    name: str  # in reports, gates and --metric
    title: str  # for people
    scale: Scale
    higher_is_better: bool = True
    ordered: bool = False  # of numbers: two models agree on pairs of rows, not on rows
    minor: bool = False  # on the console with -v only, unless it is the primary one
    test: str = "paired test"  # name of the test behind ``p_value``
    hub: str = (
        ""  # what model cards on the hub call it; empty: they do not list it, unless it is the primary one
    )
    needs: str = ""  # what rows must have for it to be measured

    def of_score(self, score: float) -> float:
        """The value of a score, which is its negative where lower is better."""
        return score if self.higher_is_better else -score

    def points(self, difference: float) -> str:
        """The size of a difference in prose: ``1.5 points`` of a share, ``0.0150`` otherwise."""
        size = abs(difference)
        return f"{100 * size:.1f} points" if self.scale == "share" else self.number(size)

    def percent(self, value: float) -> str:
        """A value in prose: ``87.30 %`` of a share, ``0.8730`` otherwise."""
        return f"{100 * value:.2f} %" if self.scale == "share" else self.number(value)

    def number(self, value: float) -> str:
        """A value in a table: four decimals, or four digits where there is no upper end."""
        return f"{value:.4g}" if self.scale == "open" else f"{value:.4f}"


_RANKED = "rows with a 'query', two of it or more, one with a label above 0"

_TABLE = (
    Metric("accuracy", "accuracy", "share", test="McNemar"),
    Metric("top1", "top-1 accuracy", "share", test="McNemar", hub="accuracy"),
    Metric("top5", "top-5 accuracy", "share", hub="accuracy"),
    Metric("micro_f1", "micro-F1", "share", hub="f1"),
    Metric("macro_f1", "macro F1", "share", hub="f1"),
    Metric("subset_accuracy", "subset accuracy", "share", test="McNemar", hub="accuracy"),
    Metric("average_precision", "average precision", "share", hub="average_precision"),
    Metric("entity_f1", "entity F1", "share", hub="f1"),
    Metric("entity_precision", "entity precision", "share", hub="precision"),
    Metric("entity_recall", "entity recall", "share", hub="recall"),
    Metric("token_accuracy", "token accuracy", "share", hub="accuracy"),
    Metric("mcc", "Matthews correlation (MCC)", "coefficient", minor=True, hub="matthews_correlation"),
    Metric("ece", "calibration error (ECE)", "share", higher_is_better=False, minor=True),
    Metric("log_loss", "log loss", "open", higher_is_better=False, minor=True),
    Metric("spearman", "Spearman", "coefficient", ordered=True, hub="spearmanr"),
    Metric("pearson", "Pearson", "coefficient", ordered=True, hub="pearsonr"),
    Metric("rmse", "RMSE", "open", higher_is_better=False, ordered=True),
    Metric("r2", "R2", "coefficient", ordered=True, hub="r_squared"),
    Metric("pair_order", "pairs in the right order", "share", ordered=True),
    Metric("ndcg_at_10", "NDCG@10", "coefficient", ordered=True, hub="ndcg_at_10", needs=_RANKED),
    Metric("mrr_at_10", "MRR@10", "coefficient", ordered=True, hub="mrr_at_10", needs=_RANKED),
)
KNOWN = {one.name: one for one in _TABLE}
"""Every metric that has a title of its own, by name."""


def of(name: str) -> Metric:
    """The metric of this name; one that the table does not know is shown under its own name, as it is.

    >>> of("ndcg_at_10").title, of("f1_of_joy").title
    ('NDCG@10', 'f1 of joy')
    """
    return KNOWN.get(name) or Metric(name, name.replace("_", " "), "open")
