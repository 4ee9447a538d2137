"""What the answers of a model look like before anybody asks how many are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcli.data.labels import printable
from kdcli.report.schema import Warning_


def doubts(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, of_input: bool = False
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
