"""One number a row: a score of a text or a pair, a reranker's relevance.

The output z is read through a link (:mod:`kdcli.tasks.links`). Without an activation it is the mean of a Gaussian with
variance 1, which gives every term one scale:

    loss        (z - y)^2 / 2, the negative log likelihood less a constant      half of transformers' squared error
    divergence  (z_after - z_before)^2 / 2, the KL of the two Gaussians

Where a model is trained, z and y are divided by the standard deviation of the labels first
(:mod:`kdcli.training.number_head`).

A temperature changes nothing: T^2 times the divergence of z / T is the divergence. With a cross-encoder's sigmoid z
is the logit of a Bernoulli distribution, which has no unit and which a temperature softens. Logits are the outputs
before the link; metrics judge the numbers after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from kdcli.errors import InputError, UsageError
from kdcli.report.schema import MetricValue, Warning_
from kdcli.tasks import CROSS_ENCODER, METRIC, intervals, links, ranking
from kdcli.tasks.intervals import Statistic, ratio
from kdcli.tasks.links import Link
from kdcli.tasks.task import Blind, Comparison, Kind, Plain, Reduction, check_finite

if TYPE_CHECKING:
    from torch import Tensor

_RANKING = ("ndcg_at_10", "mrr_at_10")


@dataclass(frozen=True)
class Regression(Plain):
    """A number.

    Args:
        primary: The primary metric, as in the contract.
        activation: Name of the link from the output to the number.
    """

    primary: str = "spearman"
    activation: str = links.IDENTITY.name

    name = "regression"
    kind: ClassVar[Kind] = "number"
    metrics = ("spearman", "pearson", "rmse", "r2", "pair_order", *_RANKING)
    pipeline_tag = "text-classification"
    limit = "It answers every text with a number, also one that is unlike all that it was trained on."

    @property
    def link(self) -> Link:
        """From the output to the number."""
        return links.LINKS[self.activation]

    @property
    def problem_type(self) -> str | None:
        """``regression``; None with a sigmoid, which transformers' pipeline applies only without one."""
        return "regression" if self.link is links.IDENTITY else None

    def measurable(self, queries: bool) -> tuple[str, ...]:
        """The ranking metrics only with queries."""
        if not queries and self.primary in _RANKING:
            raise InputError(
                f"{self.primary} orders the rows of a query, but the data have no column 'query'",
                "name the column by --columns query=NAME, or choose another --metric",
            )
        return tuple(name for name in self.metrics if queries or name not in _RANKING)

    def outputs(self, labels: Sequence[str]) -> int:
        """One."""
        return 1

    def order(self, ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
        """The one output, whatever it is called."""
        return [0]

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> Self:
        """Itself: a number is the answer."""
        return self

    def config_fields(self) -> dict[str, object]:
        """``problem_type``, the activation as CrossEncoder reads it, and the metric where it is not the default one."""
        found: dict[str, object] = {
            "problem_type": self.problem_type,
            CROSS_ENCODER: {"activation_fn": self.link.path},
        }
        if self.primary != Regression.primary:
            found[METRIC] = self.primary
        return found

    def about(self, outputs: int) -> dict[str, str]:
        """``task``, and ``activation``: the graph's output is what comes before it."""
        return {"task": self.name, "activation": self.activation}

    # Labels as arrays.

    def unlabelled(self, rows: int, outputs: int) -> np.ndarray:
        """(N,) NaN."""
        return np.full(rows, np.nan, np.float32)

    def known(self, labels: np.ndarray) -> np.ndarray:
        """Rows with a number."""
        return ~np.isnan(labels)

    def strata(self, labels: np.ndarray) -> None:
        """None: numbers form no groups."""
        return None

    def first_logits(self, labels: np.ndarray) -> np.ndarray | None:
        """The mean of the labels, where an output has their unit."""
        unit = self.unit(labels)
        return None if unit is None else np.array([unit[0]])

    def teaching_steps(self, labels: int) -> int:
        """720: a number takes longer than a class.

        MiniLM on STS-B reaches a Spearman of 0.830 on validation after the first of four epochs of 180 steps, and 0.863
        after the fourth.
        """
        return 720

    def blind(self, labels: np.ndarray) -> Blind | None:
        """The loss and the score of the mean of the labels, with the noise of an order by chance.

        A ranking metric is known for queries alone: its score is said to be 0, which every model exceeds.
        """
        n = len(labels)
        if (labels == labels[0]).all():
            return None
        mean = labels.mean(dtype=np.float64)
        square = (labels.astype(np.float64) - mean) ** 2
        deviation = float(np.sqrt(square.mean()))
        chance = 2 / float(
            np.sqrt(n - 1)
        )  # of a correlation; a share of pairs spreads by half as much at most
        score, noise = {
            "spearman": (0.0, chance),
            "pearson": (0.0, chance),
            "pair_order": (0.5, chance / 2),
            "rmse": (-deviation, float(square.std()) / deviation / float(np.sqrt(n))),
        }.get(self.primary, (0.0, 0.0))
        loss = float(square.mean()) / 2
        if self.link is links.SIGMOID:
            loss = float(-mean * np.log(mean) - (1 - mean) * np.log1p(-mean)) if 0 < mean < 1 else 0.0
        return Blind(loss, score, noise)

    def check_learnable(self, labels: np.ndarray) -> None:
        """Labels of a sigmoid are in [0, 1]."""
        self.link.check(labels)

    def unit(self, labels: np.ndarray) -> tuple[float, float] | None:
        """Mean and standard deviation; None with an activation, of labels that are all equal, and of none."""
        if self.link is not links.IDENTITY or not len(labels):
            return None
        deviation = float(labels.std(dtype=np.float64))
        return (float(labels.mean(dtype=np.float64)), deviation) if deviation > 0 else None

    @property
    def softens(self) -> bool:
        """Only what a sigmoid makes a probability of."""
        return self.link is not links.IDENTITY

    # Tensors.

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) losses of the link; 0 for a row without a label."""
        known = ~labels.isnan()
        each = self.link.loss(logits[:, 0], torch.where(known, labels, 0.0).to(logits.dtype)) * known
        return each.sum() if reduction == "sum" else each

    def divergence(self, after: Tensor, before: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) divergences of the link."""
        each = self.link.divergence(after[:, 0], before[:, 0])
        return each.sum() if reduction == "sum" else each

    def own(self, logits: Tensor) -> Tensor:
        """(B,) the numbers themselves."""
        return self.link.mean(logits.detach()[:, 0])

    def drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) draws from the link's distributions."""
        return self.link.drawn(logits.detach()[:, 0], generator)

    def curved(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 1) centred draws: the Hessian of a canonical link is the variance of its distribution."""
        return self.link.noise(logits.detach()[:, 0], generator)[:, None]

    def combined(self, every: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """(B, 1) the output whose number is the mean number."""
        z = torch.stack(list(every))
        return self.link.combined(z, z.new_tensor(weights or [1 / len(every)] * len(every)))

    # Arrays.

    def score(self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None) -> float:
        """The primary metric; the negative RMSE, so that larger is better.

        Raises:
            InputError: It needs queries that can be ranked, and there is none.
        """
        self._given(labels, queries)
        found = self._statistic(self.primary, logits, labels, queries)
        return found.value if found.higher_is_better else -found.value

    def measure(
        self, logits: np.ndarray, labels: np.ndarray, split: str, queries: np.ndarray | None = None
    ) -> dict[str, MetricValue]:
        """Each metric with the bootstrap's error and interval; NDCG@10 and MRR@10 where there are queries.

        ``rmse`` is in the unit of the labels, ``r2`` may be negative. A constant prediction has no order: its
        correlations are 0 and :meth:`doubts` says why. With queries, whole queries are resampled, and a query's rows
        count as relevant where their label is above 0; where no query can be ranked there is no ranking metric.

        Raises:
            InputError: An answer is not a finite number, or the primary metric needs queries that can be ranked.
        """
        check_finite(logits, split)
        given = self._given(labels, queries)
        every = {name: self._statistic(name, logits, labels, queries) for name in given}
        return intervals.measured(every, len(labels), split, queries)

    def compare(
        self,
        before: np.ndarray,
        after: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray | None = None,
        first: Self | None = None,
    ) -> Comparison:
        """Paired bootstrap of the primary metric, of whole queries where there are some.

        Each model's output is read through its own link.
        """
        reader = first or self
        given = self._given(labels, queries)
        one = {name: reader._statistic(name, before, labels, queries) for name in given}
        two = {name: self._statistic(name, after, labels, queries) for name in given}
        pair = intervals.paired(one[self.primary], two[self.primary], queries)
        return Comparison(
            differences={name: two[name].value - one[name].value for name in one},
            ci95=pair.ci95,
            p_value=pair.p_value,
            agreement=self.same(before, after, first),
        )

    def same(self, before: np.ndarray, after: np.ndarray, first: Self | None = None) -> float:
        """Share of pairs of rows in the same order."""
        return ranking.same_order((first or self).scores(before)[:, 0], self.scores(after)[:, 0])

    def doubts(
        self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, of_input: bool = False
    ) -> list[Warning_]:
        """``one-label``: all rows have one number; ``one-answer``: all rows get one, though they have several."""
        who, code = ("the input", "input-") if of_input else ("the model", "")
        n = len(labels)
        if (labels == labels[0]).all():
            message = f"all {n} rows have the number {labels[0]:g}: there is no order to get right"
            return [Warning_(code="one-label", message=message)]
        if self.link is links.SIGMOID and (labels.min() < 0 or labels.max() > 1):
            message = (
                f"{who} gives numbers between 0 and 1 ({self.activation}), and the labels go from {labels.min():g} to "
                f"{labels.max():g}: their order can be compared, their distance (RMSE, R2) cannot"
            )
            return [Warning_(code=f"{code}label-range", message=message)]
        if (logits == logits[0]).all():
            message = (
                f"{who} gives all {n} rows the number {self.scores(logits)[0, 0]:.6g}: it tells nothing apart, and a "
                "correlation with it is undefined and counted as 0"
            )
            return [Warning_(code=f"{code}one-answer", message=message)]
        return []

    # What people get.

    def unactivated(self, scores: np.ndarray, activation: str, where: str) -> np.ndarray:
        """What gives these numbers: themselves where no activation comes after the graph; a softmax is refused."""
        if activation != "sigmoid":
            raise InputError(f"{where} ends in a {activation}: of one number that is always 1")
        return self.link.inverse(scores)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """(N, 1) the numbers."""
        return self.link.number(logits)

    def answer(
        self, logits: np.ndarray, names: Sequence[str], top: int | None = None
    ) -> list[dict[str, object]]:
        """``score``: the number."""
        if top is not None:
            raise UsageError(f"an answer of the task {self.name} is a number: there are no labels to rank")
        return [{"score": number} for number in self.scores(logits)[:, 0].tolist()]

    def snippet(self, of_graph: bool) -> str:
        """The number."""
        if self.link is links.IDENTITY:
            return "print(float(logits[0, 0]))" if of_graph else "print(float(logits[0]))"
        if of_graph:
            return "print(1 / (1 + numpy.exp(-float(logits[0, 0]))))  # " + self.activation
        return "print(float(logits[0].sigmoid()))"

    def _given(self, labels: np.ndarray, queries: np.ndarray | None) -> tuple[str, ...]:
        """The metrics that these rows have a value of."""
        names = self.measurable(queries is not None)
        ranked = queries is not None and bool(ranking.judged(np.maximum(labels, 0), queries)[1].any())
        if not ranked and self.primary in _RANKING:
            raise InputError(
                f"{self.primary} orders the rows of a query, and none here has two rows, one with a label above 0",
                "give the rows of a query the same 'query', or choose another --metric",
            )
        return tuple(name for name in names if ranked or name not in _RANKING)

    def _statistic(
        self, metric: str, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None
    ) -> Statistic:
        x, y = self.scores(logits)[:, 0], labels.astype(np.float64)
        if metric in _RANKING:
            self.measurable(queries is not None)  # raises
            assert queries is not None
            return (ranking.ndcg if metric == "ndcg_at_10" else ranking.mrr)(x, y, queries)
        return {
            "spearman": ranking.spearman,
            "pair_order": ranking.pair_order,
            "pearson": pearson,
            "rmse": rmse,
            "r2": r2,
        }[metric](x, y)


def pearson(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Pearson's correlation of x and y (N,); 0 where either is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return intervals.linear(0.0, np.zeros(len(x)))
    p, q = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    r = float(np.clip((p * q).mean(), -1.0, 1.0))
    return intervals.correlation(r, (p * q - r * (p * p + q * q) / 2) / len(x))


def rmse(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Root of the mean squared difference of x and y (N,)."""
    return Statistic(
        np.stack([(x - y) ** 2, np.ones(len(x))], 1),
        lambda s: np.sqrt(ratio(s[:, 0], s[:, 1])),
        higher_is_better=False,
    )


def r2(x: np.ndarray, y: np.ndarray) -> Statistic:
    """1 - the squared error of x over that of the mean of y, (N,) each; 0 where y is constant."""
    if (y == y[0]).all():
        return intervals.linear(0.0, np.zeros(len(y)))
    z = y - y.mean()

    def of(s: np.ndarray) -> np.ndarray:
        spread = s[:, 1] - ratio(s[:, 2] ** 2, s[:, 3])
        # Of a resample with one number rounding alone is left.
        return np.where(spread > 1e-12 * s[:, 1], 1 - ratio(s[:, 0], spread), 0.0)

    return Statistic(np.stack([(x - y) ** 2, z * z, z, np.ones(len(x))], 1), of)
