"""Prune: take parts out of the model, or set single weights of its encoder to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdcli import registry
from kdcli.context import Applied, Context, Stage
from kdcli.request import Request
from kdcli.stages.prune import combined, search, speed, units, weights
from kdcli.stages.prune import plan as plans
from kdcli.stages.prune.combined import CombinedPlan
from kdcli.stages.prune.foresight import foreseen
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.prune.plan import PrunePlan

_KEPT_LAST = ("movement",)  # methods whose training ends where it ends


def prepare(context: Context) -> PrunePlan | CombinedPlan:
    """Refuse bad options and unknown architectures before anything is measured."""
    if combined.is_combined(context.request):
        parts = combined.check(context.request)
        registry.need_answers({part.name: part.criterion for part in parts.parts}, context.checkpoint.task)
        combined.check_model(context)
        return parts
    plan = plans.check(context.request)
    registry.need_answers({plan.name: plan.criterion}, context.checkpoint.task)
    assert context.checkpoint.family  # raises for an architecture that kdcli cannot operate on
    if plan.options.target_speedup is not None:
        speed.check(context, plan)
    return plan


def apply(context: Context, plan: PrunePlan | CombinedPlan) -> Applied:
    """Prune the model of ``context`` in place, then train it back for ``--epochs``.

    ``--sparsity F`` removes the share F of what the structure can remove: of the multiply-accumulates of
    the encoder's heads, of its neurons, or of both together, for a row of the training data's mean length;
    of the number of weights in the encoder's matrices for the structure ``weights``. A structure like ``2:4``
    keeps two of every four weights that are neighbours along the input. ``--budget F`` keeps
    the share F of all multiply-accumulates of the encoder. Both refer to the model as it comes in.
    Of layers and of the width, ``--sparsity F`` removes the share F of their number. Structures joined by ``+``
    are pruned one after the other.
    ``--target-speedup F`` cuts until the model is F times faster, as measured here at batch 1. Without any of
    them ``--max-drop F`` searches the smallest model whose primary metric falls by no more on the validation rows.

    Raises:
        UsageError: A bad option, or a budget that the structure cannot meet.
        InputError: kdcli cannot operate on this architecture, or there is nothing left to prune.
    """
    if isinstance(plan, CombinedPlan):
        if plan.max_drop is not None:
            return search.apply(
                context, plan.max_drop, lambda inner, share: combined.apply(inner, plan.removing(share))
            )
        return combined.apply(context, plan)
    if plan.options.target_speedup is not None:
        return speed.apply(context, plan)
    kind = weights if plan.zeros else units
    if plan.max_drop is not None:
        return search.apply(
            context, plan.max_drop, lambda inner, share: kind.apply(inner, replace(plan, sparsity=share))
        )
    return kind.apply(context, plan)


def chosen(request: Request, detail: Mapping[str, Any]) -> list[str]:
    """What the validation rows chose."""
    options = request.options_as(PruneOptions)
    found = ["how much was removed"] if "search" in detail else []
    found += ["the tokens that stay"] if "vocab" in options.structure.split("+") else []
    last = options.schedule == "gradual" or options.method in _KEPT_LAST
    return found + (["the epoch"] if options.epochs > 1 and not last else [])


STAGE = Stage(prepare, apply, foreseen, chosen)
