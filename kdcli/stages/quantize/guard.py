"""Quantise, look at what it cost on validation rows, and keep as few layers in float as an allowed drop demands."""

from __future__ import annotations

from typing import Any

import torch

from kdcli.context import Applied, Context
from kdcli.inputs import sampling
from kdcli.probe import bisection
from kdcli.report import metrics
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize import single_layers
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.simulated import Simulation, answer
from kdcli.stages.quantize.smoothing import smoothquant


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Carry out a plan.

    Where ``--max-drop`` was given and quantising everything loses more on validation rows, the fewest layers are
    kept in float for which it holds; where there are none, the best that was found is handed back, and the gate
    decides. ``--sensitivity`` measures every layer whatever the drop.

    Args:
        context: Its checkpoint is changed in place.
        plan: What was asked.
    """
    detail: dict[str, Any] = {}
    if plan.scheme.smooths and plan.config.smooth:
        detail["smoothquant"] = smoothquant.smooth(context, plan, plan.config.smooth)
        plan = plans.of(context, scheme=plan.name, settings=plan.settings)  # layers were replaced
    limit, asked = context.request.common.gates.max_drop, plan.options.sensitivity
    rounds, carry_out = plan.scheme.rounds, plan.scheme.apply
    if rounds is None or (limit is None and not asked):
        return _with(carry_out(context, plan), detail)
    checkpoint, validation = context.checkpoint, context.encoded["validation"]
    count = min(bisection.JUDGED_ROWS, context.request.common.limit or bisection.JUDGED_ROWS)
    rows = sampling.judged(validation, count, sampling.JUDGING_SEED, checkpoint.task)
    dense = {f"{name}.weight": layer.weight.detach().clone() for name, layer in plan.layers.items()}
    base = answer(checkpoint, rows)
    applied = carry_out(context, plan)
    assert applied.integers is not None
    quantised = checkpoint.log.quantised
    assert quantised is not None
    _restore(context, dense)
    found = None
    with Simulation(
        checkpoint, applied.integers, dense, rounds=rounds, ranges=quantised.activations
    ) as simulation:
        first = simulation.answers(simulation.layers, rows)
        drop = base.score - first.score
        missed = limit is not None and not bisection.keeps(drop, limit)
        if asked or missed:
            measured = single_layers.measure(simulation, checkpoint, rows, context.progress)
            detail["sensitivity"] = single_layers.table(measured, checkpoint.task.primary)
        if missed:
            assert limit is not None
            found = single_layers.search(simulation, measured["units"], rows, base, limit, first)
    if limit is not None:
        detail["search"] = {
            "rows": len(rows),
            "max_drop": limit,
            "drop_all_quantised": drop,
            "kept": [] if found is None else found.kept,
            "drop": drop if found is None else found.drop,
            "met": True if found is None else found.met,
            "tried": [] if found is None else found.tried,
        }
    if found is not None:
        _say(context, found, drop)
        applied = carry_out(context, plan.without(found.layers))
    else:
        rounded = applied.integers or {}
        _restore(context, {name: matrix.dense() for name, matrix in rounded.items()})
    return _with(applied, detail)


@torch.no_grad()
def _restore(context: Context, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        parameter = context.checkpoint.model.get_parameter(name)
        parameter.copy_(weight.view(parameter.shape))


def _say(context: Context, found: single_layers.FewestKept, drop: float) -> None:
    names = ", ".join(found.kept[:4]) + (" and others" if len(found.kept) > 4 else "")
    metric = metrics.of(context.checkpoint.task.primary)
    text = f"quantising everything loses {metric.points(drop)} ({metric.title}) on validation rows"
    if not found.kept:
        context.progress.note(f"{text}, and keeping layers in fp32 does not help")
        return
    end = "" if found.met else "; that is still too much, but nothing else was better"
    context.progress.note(
        f"{text}; with {len(found.kept)} layers kept in fp32 ({names}) {metric.points(max(0.0, found.drop))}{end}"
    )


def _with(applied: Applied, detail: dict[str, Any]) -> Applied:
    applied.method = applied.method.model_copy(update={"detail": applied.method.detail | detail})
    return applied
