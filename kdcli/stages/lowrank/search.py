"""The smallest budget that keeps ``--max-drop``, for matrices and for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.inputs import sampling
from kdcli.probe import bisection
from kdcli.probe import rows as calibration
from kdcli.probe.bisection import JUDGED_ROWS
from kdcli.report import metrics

MOST, LEAST = 0.95, 0.05  # of the parameters
TRIES = 6

AnyRanks = TypeVar("AnyRanks")


def smallest(
    context: Context,
    max_drop: float,
    shared: Callable[[float], AnyRanks],
    put: Callable[[AnyRanks], None],
    back: Callable[[], None],
    detail: dict[str, Any],
) -> AnyRanks | None:
    """Try budgets on validation rows, each on the dense model.

    Args:
        context: Its model is dense, before and afterwards.
        max_drop: In the unit of the primary metric.
        shared: Shares out a budget in (0, 1); a :class:`UsageError` says that it cannot be met.
        put: Puts the factors of these ranks into the model.
        back: Makes it dense again.
        detail: Gets ``search``, for the report.

    Returns:
        The ranks of the smallest budget that loses at most ``max_drop``; None where none does.
    """
    task = context.checkpoint.task
    judged = sampling.judged(context.encoded["validation"], JUDGED_ROWS, sampling.JUDGING_SEED, task)
    full, shown = calibration.score(context, judged), metrics.of(task.primary).of_score
    scores: list[float | None] = []

    def attempt(budget: float) -> tuple[AnyRanks, float] | None:
        try:
            ranks = shared(budget)
        except UsageError:  # rank 1 everywhere is more than that
            scores.append(None)
            return None
        put(ranks)
        score = calibration.score(context, judged)
        back()
        scores.append(shown(score))
        return ranks, full - score

    steps: list[dict[str, Any]] = []
    detail["search"] = {"rows": len(judged), task.primary: shown(full), "max_drop": max_drop, "steps": steps}
    found = bisection.search(attempt, max_drop, safe=MOST, bold=LEAST, tries=TRIES, safe_first=True, digits=4)
    if found is None:  # the first budget could not be met, and no other was tried
        steps.append({"budget": MOST, task.primary: None, "kept": False})
        return None
    for one, score in zip(found.tries, scores, strict=True):
        steps.append({"budget": one.amount, task.primary: score, "kept": one.kept})
    return found.result if found.kept else None
