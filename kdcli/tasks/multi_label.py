"""Any number of C labels can hold for a row.

With z the logits of a row, p_c = sigmoid(z_c) and t_c the threshold of label c, the answer is every label with
p_c >= t_c. All that compares two answers is a mean over the labels, so that the loss against labels and the divergence
from a teacher have one scale and `alpha` means what it means for one label a row:

    loss        1/C sum_c -y_c log p_c - (1 - y_c) log(1 - p_c)                  as transformers has it
    divergence  1/C sum_c p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c)),   p before, q after

The KL of two rows whose labels are independent is the sum; the mean is 1/C of it. For a teacher that is sure of every
label the divergence is the loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F

from kdcli.errors import InputError
from kdcli.names import printable
from kdcli.report.schema import MetricValue, Warning_
from kdcli.tasks import METRIC, THRESHOLDS, intervals, thresholds
from kdcli.tasks.f1 import macro_f1_statistic, micro_f1_statistic
from kdcli.tasks.intervals import Statistic
from kdcli.tasks.task import TINY, Blind, Comparison, Kind, Reduction, by_name, check_finite, highest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MultiLabel:
    """Any of C labels.

    Args:
        primary: The primary metric, as in the contract.
        thresholds: Of every label, probabilities; None: 0.5 for all.
        undecided: Validation rows are going to fit the thresholds.
    """

    primary: str = "micro_f1"
    thresholds: tuple[float, ...] | None = None
    undecided: bool = False

    name = "multi-label"
    kind: ClassVar[Kind] = "any-of"
    metrics = ("micro_f1", "macro_f1", "subset_accuracy", "average_precision")
    problem_type = "multi_label_classification"
    pipeline_tag = "text-classification"
    limit = "It knows {labels} labels; a text that fits none of them may get some, and one that fits some may get none."

    def measurable(self, queries: bool) -> tuple[str, ...]:
        """All of them."""
        return self.metrics

    def outputs(self, labels: Sequence[str]) -> int:
        """One a label."""
        return len(labels)

    def order(self, ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
        """By name."""
        return by_name(ours, theirs)

    @property
    def decides(self) -> bool:
        """The thresholds."""
        return True

    @property
    def decided(self) -> bool:
        """Whether there are thresholds, or are going to be."""
        return self.undecided or self.thresholds is not None

    def opened(self) -> Self:
        """Without thresholds, which are going to be fitted."""
        return replace(self, thresholds=None, undecided=True)

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> Self:
        """With the thresholds of :func:`kdcli.tasks.thresholds.fitted`."""
        return replace(self, thresholds=thresholds.fitted(logits, labels), undecided=False)

    def config_fields(self) -> dict[str, object]:
        """``problem_type``, and the metric and the thresholds where they are not the default ones."""
        found: dict[str, object] = {"problem_type": self.problem_type}
        if self.primary != MultiLabel.primary:
            found[METRIC] = self.primary
        if self.thresholds is not None:
            found[THRESHOLDS] = list(self.thresholds)
        return found

    def about(self, outputs: int) -> dict[str, str]:
        """``task``, and ``thresholds``: a JSON list of C probabilities."""
        return {"task": self.name, "thresholds": json.dumps(self._thresholds(outputs).tolist())}

    # Labels as arrays.

    def unlabelled(self, rows: int, outputs: int) -> np.ndarray:
        """(N, C) NaN."""
        return np.full((rows, outputs), np.nan, np.float32)

    def known(self, labels: np.ndarray) -> np.ndarray:
        """Rows without a NaN."""
        return ~np.isnan(labels).any(1)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """(N,) the rarest label of each row, C for a row that has none: a sample then keeps some of every label.

        Sechidis, Tsoumakas and Vlahavas 2011 also go by the rarest label first.
        """
        has = labels > 0.5
        rarity = np.argsort(np.argsort(has.sum(0), kind="stable"), kind="stable")  # 0: the rarest
        rank = np.where(has, rarity, labels.shape[1]).min(1)
        return np.append(np.argsort(rarity, kind="stable"), labels.shape[1])[rank]

    def check_learnable(self, labels: np.ndarray) -> None:
        """All of them are."""

    def unit(self, labels: np.ndarray) -> None:
        """None: an output is a logit."""

    def first_logits(self, labels: np.ndarray) -> np.ndarray | None:
        """The log odds of every label, from one more row with it and one without.

        With zeros every rare label starts at one half, and hundreds of steps go into the frequencies alone.

        Source: the prior of Lin et al. 2017, "Focal Loss for Dense Object Detection", ICCV, section 3.3. Differs: each
        label has its own frequency, where they have 0.01 for all.
        """
        if not len(labels):
            return None
        count = (labels > 0.5).sum(0)
        found: np.ndarray = np.log((count + 1) / (len(labels) - count + 1))
        return found

    def teaching_steps(self, labels: int) -> int:
        """180, and 100 more a label, each of which is a question of its own with few rows that say yes."""
        return 180 + 100 * labels

    def blind(self, labels: np.ndarray) -> Blind | None:
        """The loss of every label's own share, and the best score of a fixed set: the k most frequent labels, for any
        k, or the most frequent set."""
        truth = labels > 0.5
        if (truth == truth[0]).all():
            return None
        share = np.clip(truth.mean(0), 1e-12, 1 - 1e-12)
        loss = float(-(share * np.log(share) + (1 - share) * np.log(1 - share)).mean())
        order = np.argsort(-truth.sum(0), kind="stable")
        sets, many = np.unique(truth, axis=0, return_counts=True)
        fixed = [np.isin(np.arange(len(order)), order[: k + 1]) for k in range(len(order))]
        decided = replace(self, thresholds=None)
        every = [
            decided._statistic(self.primary, np.where(np.tile(one, (len(labels), 1)), 1.0, -1.0), labels)
            for one in [*fixed, sets[many.argmax()]]
        ]
        best = max(every, key=lambda one: one.value)
        return Blind(loss, best.value, 2 * float(intervals.resampled({"best": best})["best"].std()))

    # Tensors.

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) binary cross entropies, the mean over labels; 0 for a row without labels."""
        known = ~labels.isnan().any(-1)
        target = torch.where(known[:, None], labels, 0.0).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1) * known
        return each.sum() if reduction == "sum" else each

    def divergence(self, after: Tensor, before: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) KL(before || after) of one Bernoulli a label, the mean over labels, nats."""
        yes, no = F.logsigmoid(before), F.logsigmoid(-before)
        each = yes.exp() * (yes - F.logsigmoid(after)) + no.exp() * (no - F.logsigmoid(-after))
        return each.mean(-1).sum() if reduction == "sum" else each.mean(-1)

    def own(self, logits: Tensor) -> Tensor:
        """(B, C) 1 for every label at or above its threshold, else 0."""
        limits = self._thresholds(logits.shape[-1])
        # Compared as logits in single precision: not every device has double.
        odds = torch.from_numpy(np.log(limits / (1 - limits))).float().to(logits.device)
        return (logits.detach().float() >= odds).to(logits.dtype)

    def drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C) 0 or 1, every label with its own probability."""
        return torch.bernoulli(logits.detach().float().sigmoid().cpu(), generator=generator).to(logits)

    def curved(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C) sqrt(p (1 - p) / C) e with e ~ N(0, 1): the Hessian of the mean over labels is diagonal."""
        p = logits.detach().sigmoid()
        spread = (p * (1 - p) / logits.shape[-1]).sqrt()
        return spread * torch.randn(p.shape, generator=generator).to(p)

    def combined(self, every: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """(B, C) the logits of every label's mean probability."""
        z = torch.stack(list(every))
        share = z.new_tensor(weights or [1 / len(every)] * len(every)).log()[:, None, None]
        return (F.logsigmoid(z) + share).logsumexp(0) - (F.logsigmoid(-z) + share).logsumexp(0)

    # Arrays.

    def score(self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None) -> float:
        """The primary metric."""
        return self._statistic(self.primary, logits, labels).value

    def selection_score(
        self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None
    ) -> float:
        """With the best threshold for these rows, where one is going to be fitted, for the first time or anew.

        At 0.5 a student of soft answers gives no label at all for many epochs, and all of them look alike.
        """
        return (self.fitted(logits, labels) if self.decided else self).score(logits, labels)

    def set_apart(self, first: Self) -> Warning_ | None:
        """``thresholds``: one model has some, and the other is read at 0.5."""
        if (self.thresholds is None) == (first.thresholds is None):
            return None
        message = (
            f"the two models are read at different thresholds, each at its own: 'before' at "
            f"{thresholds.shown(first.thresholds)}, 'after' at {thresholds.shown(self.thresholds)}"
        )
        return Warning_(code="thresholds", message=message)

    def measure(
        self, logits: np.ndarray, labels: np.ndarray, split: str, queries: np.ndarray | None = None
    ) -> dict[str, MetricValue]:
        """Micro F1, macro F1 and average precision over the labels that occur, and the share of rows that are right as
        a whole, each with the bootstrap's error and interval.

        A label that neither occurs nor is answered has no F1, one that does not occur has no average precision: they
        are left out of the means.

        Raises:
            InputError: An answer is not a finite number.
        """
        check_finite(logits, split)
        every = {name: self._statistic(name, logits, labels) for name in self.metrics}
        return intervals.measured(every, len(labels), split, queries)

    def compare(
        self,
        before: np.ndarray,
        after: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray | None = None,
        first: Self | None = None,
    ) -> Comparison:
        """Paired bootstrap of the primary metric. A row can be partly right, so none are counted as lost or won."""
        one = {name: (first or self)._statistic(name, before, labels) for name in self.metrics}
        two = {name: self._statistic(name, after, labels) for name in self.metrics}
        pair = intervals.paired(one[self.primary], two[self.primary], queries)
        return Comparison(
            differences={name: two[name].value - one[name].value for name in self.metrics},
            ci95=pair.ci95,
            p_value=pair.p_value,
            agreement=self.same(before, after, first),
        )

    def same(self, before: np.ndarray, after: np.ndarray, first: Self | None = None) -> float:
        """Share of rows with the same set of labels."""
        return float(((first or self).chosen(before) == self.chosen(after)).all(1).mean())

    def doubts(
        self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, of_input: bool = False
    ) -> list[Warning_]:
        """``one-label``: all rows have the same labels, or none; ``one-answer``: all rows get the same ones, though
        they have several; ``majority``: the micro F1 is no higher than that of the best fixed set of labels."""
        who, code = ("the input", "input-") if of_input else ("the model", "")
        truth, answers, n = labels > 0.5, self.chosen(logits), len(labels)
        if (truth == truth[0]).all():
            message = (
                f"all {n} rows have {_listed(truth[0], names)}: they say nothing of how labels are told apart"
            )
            return [Warning_(code="one-label", message=message)]
        own = self._statistic("micro_f1", logits, labels).value
        if (answers == answers[0]).all():
            message = (
                f"{who} gives all {n} rows {_listed(answers[0], names)}: it tells nothing apart, and its micro F1 of "
                f"{own:.4f} is what that answer has"
            )
            return [Warning_(code=f"{code}one-answer", message=message)]
        counts = np.sort(truth.sum(0))[::-1]
        many = np.arange(1, len(counts) + 1)
        fixed = 2 * np.cumsum(counts) / (n * many + counts.sum())  # of always giving the k most frequent
        best = int(fixed.argmax())
        if own <= fixed[best]:
            always = np.zeros(len(counts), bool)
            always[np.argsort(-truth.sum(0), kind="stable")[: best + 1]] = True
            message = (
                f"{who} has a micro F1 of {own:.4f}, no more than always giving {_listed(always, names)} would "
                f"have ({fixed[best]:.4f})"
            )
            return [Warning_(code=f"{code}majority", message=message)]
        return []

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """(N, C) bool: every label at or above its threshold."""
        return probabilities(logits) >= self._thresholds(logits.shape[1])

    def unactivated(self, scores: np.ndarray, activation: str, where: str) -> np.ndarray:
        """log p - log(1 - p) of what a sigmoid gave; a softmax is refused."""
        if activation != "sigmoid":
            raise InputError(
                f"{where} ends in a {activation}: it chooses one label, but its configuration or --task says that any "
                "number of labels can hold",
                "say problem_type 'single_label_classification' in config.json, or export the model without it",
            )
        return np.log(np.maximum(scores, TINY)) - np.log(np.maximum(1 - scores, TINY))

    # What people get.

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """(N, C) the probability of every label."""
        return probabilities(logits)

    def answer(
        self, logits: np.ndarray, names: Sequence[str], top: int | None = None
    ) -> list[dict[str, object]]:
        """``labels``: the names of the row's labels, none or several; ``scores``: the probability of every label."""
        return [
            {
                "labels": [name for name, one in zip(names, chosen, strict=True) if one],
                "scores": dict(zip(names, row.tolist(), strict=True))
                if top is None
                else highest(row, names, top),
            }
            for row, chosen in zip(probabilities(logits), self.chosen(logits), strict=True)
        ]

    def snippet(self, of_graph: bool) -> str:
        """Sigmoid, thresholds, names; a graph's thresholds are in its metadata, the checkpoint's in its task."""
        if of_graph:
            return (
                "scores = 1 / (1 + numpy.exp(-logits[0]))\n"
                'limits, labels = json.loads(about["thresholds"]), json.loads(about["labels"])\n'
                "print([label for label, score, limit in zip(labels, scores, limits) if score >= limit])"
            )
        return (
            "limits = loaded.task.thresholds or [0.5] * len(loaded.labels)\n"
            "scores = logits.sigmoid().tolist()\n"
            "print([label for label, score, limit in zip(loaded.labels, scores, limits) if score >= limit])"
        )

    def _thresholds(self, outputs: int) -> np.ndarray:
        if self.thresholds is None:
            return np.full(outputs, thresholds.DEFAULT)
        if len(self.thresholds) != outputs:
            raise InputError(
                f"the model has {outputs} labels, but {len(self.thresholds)} thresholds are stored with it",
                f"remove {THRESHOLDS} from its config.json to decide at {thresholds.DEFAULT}",
            )
        return np.array(self.thresholds)

    def _statistic(self, metric: str, logits: np.ndarray, labels: np.ndarray) -> Statistic:
        truth = labels > 0.5
        if metric == "average_precision":
            return average_precision(logits, truth)
        answers = self.chosen(logits)
        if metric == "subset_accuracy":
            return intervals.mean((answers == truth).all(1).astype(np.float64))
        return (
            micro_f1_statistic(answers, truth) if metric == "micro_f1" else macro_f1_statistic(answers, truth)
        )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid of logits (N, C), in double precision."""
    from scipy.special import expit

    return expit(logits.astype(np.float64))


def average_precision(logits: np.ndarray, truth: np.ndarray) -> Statistic:
    """Mean over the labels that occur of sum_n (R_n - R_{n-1}) P_n, over the distinct scores of a label.

    With TP_i and N_i the positive and all rows with a score of at least s_i, it is the mean of TP_i / N_i over the
    positive rows i, and its influence function that formula's derivative with respect to the rows' weights.

    Args:
        logits: (N, C).
        truth: (N, C) bool.
    """
    values, influence = [], np.zeros(len(truth))
    for scores, positive in zip(logits.T, truth.T, strict=True):
        if not positive.any():
            continue
        order = np.argsort(-scores, kind="stable")
        s, y = scores[order], positive[order].astype(np.float64)
        new = np.append(True, s[1:] != s[:-1])
        first = np.flatnonzero(new)  # of each distinct score
        group = np.cumsum(new) - 1
        last = np.append(first[1:], len(s)) - 1
        above, hits = (last + 1.0)[group], np.cumsum(y)[last][group]
        value = float((y * hits / above).sum() / y.sum())
        # A row changes TP_i and N_i of every positive row with no higher score.
        gain = np.cumsum((y / above)[::-1])[::-1][first][group]
        cost = np.cumsum((y * hits / above**2)[::-1])[::-1][first][group]
        influence[order] += (y * (hits / above - value + gain) - cost) / y.sum()
        values.append(value)
    if not values:
        return intervals.linear(0.0, influence)
    return intervals.linear(float(np.mean(values)), influence / len(values))


def _listed(chosen: np.ndarray, names: Sequence[str]) -> str:
    given = [f"'{printable(names[i])}'" for i in np.flatnonzero(chosen).tolist()]
    if not given:
        return "no label"
    shown = ", ".join(given[:3]) + (f" and {len(given) - 3} more" if len(given) > 3 else "")
    return f"the label{'s' if len(given) > 1 else ''} {shown}"
