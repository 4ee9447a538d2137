"""``--max-drop`` as a search: the smallest model whose score on the validation rows falls by no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from kdcli.context import Applied, Context
from kdcli.errors import InputError
from kdcli.models import checkpoint as checkpoints
from kdcli.report.schema import Warning_
from kdcli.stages.prune.plan import TRIES
from kdcli.training import loop

MOST = 0.95  # of what the structure can remove
_BATCH = 128

Result = TypeVar("Result")


@dataclass
class Best(Generic[Result]):
    """Where a search ended."""

    result: Result
    removed: float  # the share that was removed
    kept: bool  # whether it keeps the quality
    trace: list[tuple[float, float]]  # (share removed, drop) of every try, in order


def bisect(
    attempt: Callable[[float], tuple[Result, float]],
    max_drop: float,
    *,
    most: float = MOST,
    tries: int,
) -> Best[Result]:
    """Find the largest share that can be removed at a drop of at most ``max_drop``, by halving.

    The drop is taken to rise with the share. Where noise makes it fall again, the result still is a model
    that was tried and keeps the limit.

    Args:
        attempt: Removes a share and gives the result and its drop in quality.
        max_drop: Largest drop allowed.
        most: The largest share to think of, in (0, 1].
        tries: At least 1.

    Returns:
        The try that removed most among those that keep the limit; without any, the one with the smallest drop.
    """
    low, high = 0.0, most
    trace: list[tuple[float, float]] = []
    best: tuple[Result, float, float] | None = None
    for _ in range(tries):
        share = (low + high) / 2
        result, drop = attempt(share)
        trace.append((share, drop))
        if _keeps(drop, max_drop):
            low, best = share, (result, share, drop)
        else:
            high = share
            if best is None or (not _keeps(best[2], max_drop) and drop <= best[2]):
                best = (result, share, drop)
        del result
    assert best is not None
    return Best(best[0], best[1], _keeps(best[2], max_drop), trace)


def apply(context: Context, max_drop: float, cut: Callable[[Context, float], Applied]) -> Applied:
    """Try several amounts, each on the input as it came, and return the smallest model that keeps ``max_drop``.

    Args:
        context: The input.
        max_drop: In points of 1 of the primary metric on the validation rows.
        cut: Prunes the model of a context by a share, recovery included.

    Raises:
        InputError: The validation rows have no labels to judge by.
    """
    start = context.checkpoint
    metric, labels = start.task.primary, context.encoded["validation"].labels
    if labels is None or not start.task.known(labels).all():
        raise InputError(
            f"--max-drop searches by the {metric} on the validation rows, and some have no label"
        )
    dense = score(context)
    rows: list[dict[str, Any]] = []

    def attempt(share: float) -> tuple[Applied, float]:
        begun, number = time.perf_counter(), len(rows) + 1
        loaded = checkpoints.load(start.path, labels=start.labels, device=context.device)
        inner = replace(context, checkpoint=loaded, resume_dir=context.resume_dir / f"try-{number}")
        context.progress.note(f"try {number} of {TRIES}: {share:.1%} removed")
        applied = cut(inner, share)
        value = score(replace(inner, checkpoint=applied.checkpoint))
        rows.append(
            {
                "try": number,
                "sparsity": share,
                "macs_kept": applied.method.detail.get("encoder_macs_kept"),
                metric: value,
                "drop": dense - value,
                "kept": _keeps(dense - value, max_drop),
                "seconds": round(time.perf_counter() - begun, 1),
            }
        )
        context.progress.note(f"try {number}: validation {metric} {value:.4f} after {dense:.4f}")
        return applied, dense - value

    best = bisect(attempt, max_drop, tries=TRIES)
    applied = best.result
    applied.method.params["sparsity"] = best.removed
    applied.method.detail["search"] = {
        "split": "validation",
        "rows": len(labels),
        f"{metric}_before": dense,
        "max_drop": max_drop,
        "tries": rows,
    }
    if not best.kept:
        said = (
            f"no try keeps a drop of {max_drop:g} on the validation rows; "
            f"this is the one that comes closest, {best.removed:.1%} removed"
        )
        applied.warnings.append(Warning_(code="max-drop-missed", message=said))
    return applied


def score(context: Context) -> float:
    """The task's, of the model of ``context`` on its validation rows, by torch."""
    rows, made = context.encoded["validation"], context.checkpoint
    batches = loop.inference(rows, _BATCH, made.pad_id)
    return loop.evaluate(made.task, made.model, rows, batches, context.device)[0]


def _keeps(drop: float, max_drop: float) -> bool:
    # A drop of exactly the limit is allowed: 0.9 - 0.89 must not fail 0.01 for its last binary digit.
    return drop <= max_drop + 1e-12
