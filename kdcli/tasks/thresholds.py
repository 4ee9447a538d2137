"""From which probability on a label is given: fitted on rows that have labels."""

from __future__ import annotations

import math

import numpy as np

DEFAULT = 0.5
"""Of a model that says nothing."""


def fitted(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """The one threshold for all C labels that maximises micro F1 on these rows, exactly.

    One for all, because that is what the optimum of micro F1 looks like: with calibrated probabilities every label's
    best threshold is the same one, half of the best F1 (Lipton, Elkan and Narayanaswamy 2014, theorem 1). One a label,
    fitted alone, follows the noise of the labels that occur a dozen times.
    Measured on GoEmotions (28 labels, logistic regression on word pairs, thresholds from the 5,426 validation rows or
    300 of them, micro F1 of the test rows): 0.5 for all gives 47.7, this one 54.4 and 54.1, one a label for its own F1
    52.3 and 46.3, one a label for the common micro F1 54.5 and 52.6.

    It lies half way between two neighbouring logits. Among equally good ones it is the nearest to 0.5, and 0.5 where
    no row has a label.

    Args:
        logits: (N, C).
        labels: (N, C) 0 or 1, of rows that all have them.
    """
    z, y = logits.astype(np.float64).ravel(), labels.ravel() > 0.5
    if not y.any():
        return (DEFAULT,) * logits.shape[1]
    order = np.argsort(-z, kind="stable")
    z, hits = z[order], np.cumsum(y[order])
    ends = np.flatnonzero(np.append(z[1:] != z[:-1], True))  # the last of every distinct logit
    f1 = 2 * hits[ends] / (ends + 1 + hits[-1])
    after = np.append(z[ends[:-1] + 1], z[-1] - 2.0)
    middle = (z[ends] + after) / 2
    best = np.flatnonzero(f1 == f1.max())
    at = middle[best[np.abs(middle[best]).argmin()]]
    # Beyond 30 a probability is 0 or 1 to 13 digits, and no threshold lies between.
    return (1 / (1 + math.exp(-max(-30.0, min(30.0, at)))),) * logits.shape[1]


def shown(thresholds: tuple[float, ...] | None) -> str:
    """The thresholds of a model for a sentence: one, or the lowest and the highest."""
    if thresholds is None:
        return f"{DEFAULT} (none is stored with it)"
    low, high = min(thresholds), max(thresholds)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
