"""One of C classes a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from kdcli.errors import InputError
from kdcli.names import printable
from kdcli.report.schema import MetricValue, Warning_
from kdcli.tasks import METRIC, intervals
from kdcli.tasks.f1 import macro_f1_statistic
from kdcli.tasks.intervals import Statistic, ratio
from kdcli.tasks.task import TINY, Blind, Comparison, Plain, Reduction, by_name, check_finite, highest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNLABELLED = -100  # the index that cross entropy ignores
BINS = 15
_Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
_LOWER_IS_BETTER = ("ece", "log_loss")


@dataclass(frozen=True)
class Classification(Plain):
    """A row has one of C labels; its answer is the most probable one."""

    primary: str = "accuracy"

    @property
    def name(self) -> str:
        """As ``--task`` and reports have it."""
        return "text-classification"

    @property
    def kind(self) -> Literal["one-of"]:
        """An answer is one of C."""
        return "one-of"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy, macro F1, Matthews' correlation, calibration error of 15 bins, and log loss in nats."""
        return ("accuracy", "macro_f1", "mcc", "ece", "log_loss")

    @property
    def problem_type(self) -> str:
        """As transformers' ``config.problem_type`` has it."""
        return "single_label_classification"

    @property
    def pipeline_tag(self) -> str:
        """As the hub calls the task in a model card."""
        return "text-classification"

    @property
    def limit(self) -> str:
        """That there is always an answer."""
        return "It knows {labels} labels and always answers with one of them, also for a text that fits none."

    def outputs(self, labels: Sequence[str]) -> int:
        """One for every label."""
        return len(labels)

    def order(self, ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
        """By name."""
        return by_name(ours, theirs)

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> Self:
        """Itself: the most probable label needs no threshold."""
        return self

    def config_fields(self) -> dict[str, object]:
        """``problem_type``, and the metric where it is not the default one."""
        found: dict[str, object] = {"problem_type": self.problem_type}
        if self.primary != Classification.primary:
            found[METRIC] = self.primary
        return found

    def about(self, outputs: int) -> dict[str, str]:
        """Nothing."""
        return {}

    def unlabelled(self, rows: int, outputs: int) -> np.ndarray:
        """(N,) int64, -100."""
        return np.full(rows, UNLABELLED, dtype=np.int64)

    def known(self, labels: np.ndarray) -> np.ndarray:
        """(N,) bool, True where a row has a label."""
        return labels >= 0

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The labels themselves."""
        return labels

    def blind(self, labels: np.ndarray) -> Blind | None:
        """Equal probabilities for the labels that occur, and the share of the most frequent one.

        The score is that of the accuracy whatever the primary metric: no other one is larger for one answer alone.
        """
        counts = np.bincount(labels[labels >= 0])
        if (counts > 0).sum() < 2:
            return None
        share = float(counts.max() / len(labels))
        return Blind(math.log((counts > 0).sum()), share, 2 * math.sqrt(share * (1 - share) / len(labels)))

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "none") -> Tensor:
        """Cross entropy in nats; 0 where the label is -100."""
        import torch.nn.functional as F

        return F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction=reduction)

    def divergence(self, after: Tensor, before: Tensor, reduction: Reduction = "none") -> Tensor:
        """KL(before || after) in nats."""
        import torch.nn.functional as F

        each = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True)
        return each.sum() if reduction == "sum" else each.sum(-1)

    def own(self, logits: Tensor) -> Tensor:
        """The most probable label (B,)."""
        return logits.argmax(1)

    def drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Labels (B,) drawn from the softmax."""
        import torch

        probabilities = logits.softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)

    def curved(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """sqrt(p) * e - p (sqrt(p) . e) with e ~ N(0, 1), whose second moment is diag(p) - p p^T."""
        import torch

        p = logits.detach().softmax(-1)
        sampled = p.sqrt() * torch.randn(p.shape, generator=generator).to(p)
        return sampled - p * sampled.sum(-1, keepdim=True)

    def combined(self, every: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """The logarithm of the mean of the probabilities, in float32 at least."""
        import torch

        answers = torch.stack([(z if z.dtype.itemsize >= 4 else z.float()).log_softmax(-1) for z in every])
        if weights is not None:
            answers = answers + answers.new_tensor(weights).log()[:, None, None]
        return answers.logsumexp(0)

    def score(self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None) -> float:
        """The primary metric alone; negative where less is better."""
        value = _METRICS[self.primary](logits, labels)
        return -value if self.primary in _LOWER_IS_BETTER else value

    def measure(
        self, logits: np.ndarray, labels: np.ndarray, split: str, queries: np.ndarray | None = None
    ) -> dict[str, MetricValue]:
        """Every metric; macro F1 and Matthews' correlation are over the classes among labels or answers.

        Accuracy has its standard error and Wilson's interval, another primary metric those of drawn rows.

        Raises:
            InputError: An answer is not a finite number.
        """
        n = len(labels)
        check_finite(logits, split)
        found = {}
        for name in self.metrics:
            value, stderr, ci95 = _METRICS[name](logits, labels), None, None
            if name == "accuracy":
                stderr, ci95 = math.sqrt(value * (1 - value) / n), wilson(round(value * n), n)
            elif name == self.primary:
                one = intervals.measured({name: _STATISTICS[name](logits, labels)}, n, split)[name]
                stderr, ci95 = one.stderr, one.ci95
            found[name] = MetricValue(
                value=value,
                stderr=stderr,
                ci95=ci95,
                n=n,
                split=split,
                higher_is_better=name not in _LOWER_IS_BETTER,
            )
        return found

    def compare(
        self,
        before: np.ndarray,
        after: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray | None = None,
        first: Self | None = None,
    ) -> Comparison:
        """Paired: McNemar's test for accuracy, for another primary metric the paired bootstrap."""
        one, two = before.argmax(1), after.argmax(1)
        pair = paired(one, two, labels)
        ci95, p_value = pair.ci95, pair.p_value
        if self.primary != "accuracy":
            statistic = _STATISTICS[self.primary]
            drawn = intervals.paired(statistic(before, labels), statistic(after, labels))
            ci95, p_value = drawn.ci95, drawn.p_value
        return Comparison(
            differences={name: of(after, labels) - of(before, labels) for name, of in _METRICS.items()},
            ci95=ci95,
            p_value=p_value,
            agreement=float((one == two).mean()),
            lost=pair.lost,
            won=pair.won,
        )

    def same(self, before: np.ndarray, after: np.ndarray, first: Self | None = None) -> float:
        """Share of the rows with the same most probable label."""
        return float((before.argmax(1) == after.argmax(1)).mean())

    def doubts(
        self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, of_input: bool = False
    ) -> list[Warning_]:
        """Warn where an accuracy means less than it seems to.

        Args:
            logits: (N, C).
            labels: (N,) the truth.
            names: Of the C labels.
            of_input: The answers are those of the model that a stage started from; its codes begin with ``input-``.

        Returns:
            ``one-answer``: the model gives every row the same answer, though the rows have several labels;
            ``majority``: it is right no more often than whoever always gives the most frequent one;
            ``one-label``: the rows have one label only, so accuracy says nothing of the others.
        """
        who, code = ("the input", "input-") if of_input else ("the model", "")
        answers, n = logits.argmax(1), len(labels)
        truth = np.bincount(labels, minlength=len(names))
        most = int(truth.argmax())
        share, right = truth[most] / n, float((answers == labels).mean())
        frequent = f"'{printable(names[most])}'"
        if truth[most] == n:
            message = (
                f"all {n} rows have the label {frequent}: they say nothing of how other labels are told apart"
            )
            return [Warning_(code="one-label", message=message)]
        if len(np.unique(answers)) == 1:
            message = (
                f"{who} gives all {n} rows one and the same answer, '{printable(names[int(answers[0])])}': "
                f"it tells nothing apart, and its accuracy of {right:.4f} is the share of that label"
            )
            return [Warning_(code=f"{code}one-answer", message=message)]
        if right <= share:
            message = (
                f"{who} is right on {right:.4f} of the rows, no more than always answering {frequent} would be "
                f"({share:.4f})"
            )
            return [Warning_(code=f"{code}majority", message=message)]
        return []

    def unactivated(self, scores: np.ndarray, activation: str, where: str) -> np.ndarray:
        """The logarithms of what a softmax gave, whose softmax they are; a sigmoid is refused."""
        if activation != "softmax":
            raise InputError(
                f"{where} ends in a {activation}: it says yes or no to every label, but its configuration or --task "
                "says that one label is chosen",
                "say problem_type 'multi_label_classification' in config.json if any number of labels can hold",
            )
        return np.log(np.maximum(scores, TINY))

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """The softmax."""
        return _probabilities(logits)

    def answer(
        self, logits: np.ndarray, names: Sequence[str], top: int | None = None
    ) -> list[dict[str, object]]:
        """The label of every row and its probability; with ``top`` also ``scores``, those of several labels."""
        return [
            {"label": names[at], "score": float(row[at])}
            | ({} if top is None else {"scores": highest(row, names, top)})
            for at, row in zip(logits.argmax(1), _probabilities(logits), strict=True)
        ]

    def snippet(self, of_graph: bool) -> str:
        """Print the label."""
        if of_graph:
            return 'print(json.loads(about["labels"])[int(logits[0].argmax())])'
        return "print(loaded.labels[int(logits.argmax())])"


CLASSIFICATION = Classification()


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose most probable label is the right one."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of the classes that occur among labels or answers."""
    answers = logits.argmax(1)
    given, right = (np.bincount(x, minlength=logits.shape[1]) for x in (labels, labels[answers == labels]))
    given = given + np.bincount(answers, minlength=logits.shape[1])
    return float((2 * right[given > 0] / given[given > 0]).mean())


def correlation(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of labels and answers for C classes (Gorodkin 2004, eq. 8); 0 where one has no variance."""
    answers = logits.argmax(1)
    n, right = len(labels), int((answers == labels).sum())
    truth, given = (np.bincount(x, minlength=logits.shape[1]).astype(np.float64) for x in (labels, answers))
    spread = math.sqrt((n * n - (truth**2).sum()) * (n * n - (given**2).sum()))
    return float((right * n - truth @ given) / spread) if spread > 0 else 0.0


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy in nats."""
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    return float((np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels]).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the top-1 confidence over equal-width bins (Guo et al. 2017, eq. 3)."""
    confidence = _probabilities(logits).max(1)
    right = (logits.argmax(1) == labels).astype(np.float64)
    # Bins are (lower, upper], as in the paper.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "mcc": correlation,
    "ece": calibration_error,
    "log_loss": log_loss,
}


def _macro_f1(logits: np.ndarray, labels: np.ndarray) -> Statistic:
    each = np.eye(logits.shape[1], dtype=bool)
    return macro_f1_statistic(each[logits.argmax(1)], each[labels])


def _correlation(logits: np.ndarray, labels: np.ndarray) -> Statistic:
    classes = logits.shape[1]
    given, truth = np.eye(classes)[logits.argmax(1)], np.eye(classes)[labels]

    def of(s: np.ndarray) -> np.ndarray:
        g, t, right = s[:, :classes], s[:, classes:-1], s[:, -1]
        n = t.sum(1)
        spread = (n**2 - (g**2).sum(1)) * (n**2 - (t**2).sum(1))
        return ratio(right * n - (g * t).sum(1), np.sqrt(np.maximum(spread, 0.0)))

    return Statistic(np.concatenate([given, truth, (given * truth).sum(1, keepdims=True)], 1), of)


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> Statistic:
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    return intervals.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels])


def _calibration_error(logits: np.ndarray, labels: np.ndarray) -> Statistic:
    confidence = _probabilities(logits).max(1)
    gap = (logits.argmax(1) == labels) - confidence
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    sums = np.concatenate([np.eye(BINS)[index] * gap[:, None], np.ones((len(labels), 1))], 1)
    return Statistic(sums, lambda s: ratio(np.abs(s[:, :-1]).sum(1), s[:, -1]))


# The same metrics as functions of sums over rows, for their resamples.
_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], Statistic]] = {
    "macro_f1": _macro_f1,
    "mcc": _correlation,
    "ece": _calibration_error,
    "log_loss": _log_loss,
}


def _probabilities(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(1, keepdims=True)
    return probabilities


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927, eq. 4); unlike the normal one it stays in [0, 1]."""
    share, square = right / n, _Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows: what one got right and the other did not."""

    lost: int  # rows that only the first got right
    won: int  # rows that only the second got right
    n: int

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value that both are equally often right (McNemar 1947): a binomial test on the rows
        that exactly one of them got right; 1.0 when there are none."""
        from scipy.special import bdtr  # not scipy.stats: half a second to import

        # With equal chances both tails are alike; the middle would count twice.
        return min(1.0, 2 * float(bdtr(min(self.lost, self.won), self.lost + self.won, 0.5)))

    @property
    def ci95(self) -> tuple[float, float]:
        """95% interval of the difference: half a row is added to each of the four cells of the table of both
        models' hits, then the normal one (Agresti and Min 2005, section 2.2). Shorter than what two separate
        intervals say, because the models meet the same rows."""
        n, lost, won = self.n + 2, self.lost + 0.5, self.won + 0.5
        centre = (won - lost) / n
        half = _Z95 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
        return max(-1.0, centre - half), min(1.0, centre + half)


def paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Paired:
    """Compare two models row by row.

    Args:
        before: (N,) answers of one model.
        after: (N,) answers of the other, to the same rows.
        labels: (N,) the truth.
    """
    return Paired(
        lost=int(((before == labels) & (after != labels)).sum()),
        won=int(((before != labels) & (after == labels)).sum()),
        n=len(labels),
    )
