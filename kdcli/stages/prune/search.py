"""``--max-drop`` as a search: the smallest model whose score on the validation rows falls by no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kdcli.context import Applied, Context
from kdcli.errors import InputError
from kdcli.models import checkpoint as checkpoints
from kdcli.probe import bisection
from kdcli.report import metrics
from kdcli.report.schema import Warning_
from kdcli.stages.prune.plan import TRIES
from kdcli.training import loop

MOST = 0.95  # of what the structure can remove
_BATCH = 128


def apply(context: Context, max_drop: float, cut: Callable[[Context, float], Applied]) -> Applied:
    """Try several amounts, each on the input as it came, and return the smallest model that keeps ``max_drop``.

    Args:
        context: The input.
        max_drop: In the unit of the primary metric, on the validation rows.
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
    dense, shown = score(context), metrics.of(metric).of_score
    rows: list[dict[str, Any]] = []

    def attempt(share: float) -> tuple[Applied, float]:
        begun, number = time.perf_counter(), len(rows) + 1
        loaded = checkpoints.load(start.path, labels=start.labels, device=context.device)
        loaded.task = start.task  # --metric is not in the files
        inner = replace(context, checkpoint=loaded, resume_dir=context.resume_dir / f"try-{number}")
        context.progress.note(f"try {number} of {TRIES}: {share:.1%} removed")
        applied = cut(inner, share)
        value = score(replace(inner, checkpoint=applied.checkpoint))
        rows.append(
            {
                "try": number,
                "sparsity": share,
                "macs_kept": applied.method.detail.get("encoder_macs_kept"),
                metric: shown(value),
                "drop": dense - value,
                "kept": bisection.keeps(dense - value, max_drop),
                "seconds": round(time.perf_counter() - begun, 1),
            }
        )
        context.progress.note(
            f"try {number}: validation {metric} {shown(value):.4f} after {shown(dense):.4f}"
        )
        return applied, dense - value

    best = bisection.search(attempt, max_drop, safe=0.0, bold=MOST, tries=TRIES)
    assert best is not None, "every share can be tried"
    applied = best.result
    applied.method.params["sparsity"] = best.amount
    applied.method.detail["search"] = {
        "split": "validation",
        "rows": len(labels),
        f"{metric}_before": shown(dense),
        "max_drop": max_drop,
        "tries": rows,
    }
    if not best.kept:
        said = (
            f"no try keeps a drop of {max_drop:g} on the validation rows; "
            f"this is the one that comes closest, {best.amount:.1%} removed"
        )
        applied.warnings.append(Warning_(code="max-drop-missed", message=said))
    return applied


def score(context: Context) -> float:
    """The task's, of the model of ``context`` on its validation rows, by torch."""
    rows, made = context.encoded["validation"], context.checkpoint
    batches = loop.inference(rows, _BATCH, made.pad_id)
    return loop.evaluate(made.task, made.model, rows, batches, context.device)[0]
