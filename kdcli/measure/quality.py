"""Quality of answers: accuracy, macro F1, calibration, and whether two models really differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kdcli.errors import InputError
from kdcli.report.schema import MetricValue
from kdcli.tasks.task import Comparison

BINS = 15
_Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution


def measure(logits: np.ndarray, labels: np.ndarray, split: str) -> dict[str, MetricValue]:
    """Measure classification quality.

    Args:
        logits: (N, C).
        labels: (N,) class indices.
        split: Name of the rows, for the report.

    Returns:
        Accuracy, macro F1 over the classes that occur among labels or answers, and calibration error.

    Raises:
        InputError: An answer is not a finite number.
    """
    from sklearn.metrics import f1_score

    n = len(labels)
    if broken := n - int(np.isfinite(logits).all(1).sum()):
        raise InputError(
            f"the model's answer to {broken} of {n} rows of '{split}' is not a finite number",
            "something overflows when it runs; use a wider number format or the model as it was before",
        )
    predicted = logits.argmax(1)
    right = int((predicted == labels).sum())
    value = right / n
    accuracy = MetricValue(
        value=value, stderr=math.sqrt(value * (1 - value) / n), ci95=wilson(right, n), n=n, split=split
    )
    macro = float(f1_score(labels, predicted, average="macro", zero_division=0))
    return {
        "accuracy": accuracy,
        "macro_f1": MetricValue(value=macro, n=n, split=split),
        "ece": MetricValue(value=calibration_error(logits, labels), n=n, split=split, higher_is_better=False),
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927, eq. 4); unlike the normal one it stays in [0, 1]."""
    share, square = right / n, _Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the top-1 confidence over equal-width bins (Guo et al. 2017, eq. 3)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence = probabilities.max(1)
    right = (logits.argmax(1) == labels).astype(np.float64)
    # Bins are (lower, upper], as in the paper.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows: what one got right and the other did not."""

    lost: int  # rows that only the first got right
    won: int  # rows that only the second got right
    n: int

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first, in points of 1."""
        return (self.won - self.lost) / self.n

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value that both are equally often right (McNemar 1947): a binomial test on the rows
        that exactly one of them got right; 1.0 when there are none."""
        from scipy.stats import binomtest

        either = self.lost + self.won
        return 1.0 if either == 0 else float(binomtest(self.won, either, 0.5).pvalue)

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


def mcnemar(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> float:
    """The p-value of :func:`paired`."""
    return paired(before, after, labels).p_value


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Comparison:
    """Two models' answers (N,) to the same rows, in the same order of labels."""
    pair = paired(before, after, labels)
    return Comparison(
        differences={"accuracy": pair.difference},
        ci95=pair.ci95,
        p_value=pair.p_value,
        agreement=float((before == after).mean()),
        lost=pair.lost,
        won=pair.won,
    )
