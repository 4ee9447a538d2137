"""Quantize: fewer bits for weights, and where a scheme says so for activations."""

from __future__ import annotations

from typing import Any

from kdcli.context import Applied, Context, Stage
from kdcli.report.schema import Warning_
from kdcli.request import Request
from kdcli.stages.quantize import auto, guard, oldest_runtime
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize.auto import AutoPlan
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.training.recovery import zero_shares


def prepare(context: Context) -> QuantizePlan | AutoPlan:
    """Refuse bad options before anything is measured."""
    options = context.request.options_as(QuantizeOptions)
    if options.scheme == auto.SCHEME:
        return auto.plan_of(context)
    plan = plans.of(context)
    plan.scheme.check(context, plan)
    return plan


def apply(context: Context, plan: QuantizePlan | AutoPlan) -> Applied:
    """Quantise the model of ``context``; its weights become the rounded values, so that it can be measured.

    Raises:
        UsageError: A bad option, or patterns that match nothing or leave nothing.
    """
    had = zero_shares(context.checkpoint)
    applied = auto.apply(context, plan) if isinstance(plan, AutoPlan) else guard.apply(context, plan)
    filled = [name for name, share in zero_shares(applied.checkpoint).items() if share < had[name] / 2]
    if filled:
        text = f"{len(filled)} matrices had zeros from an earlier stage, and one bit has no zero: they are filled"
        advice = "--scheme ternary keeps them"
        applied.warnings.append(Warning_(code="zeros-refilled", message=f"{text}; {advice}"))
    return applied


STAGE = Stage(prepare, apply)


def foreseen(request: Request) -> tuple[dict[str, Any], str | None]:
    """What can be said of a quantisation before a model is loaded: facts, and the onnxruntime that its graph needs.

    Raises:
        UsageError: A bad option.
    """
    options = request.options_as(QuantizeOptions)
    if options.scheme == auto.SCHEME:
        auto.configured(request.common.settings)
        return {"scheme": options.scheme, "embeddings": options.embeddings or "int8"}, None
    found = plans.settle(options.scheme, request.common.settings)
    tables = plans.tables_of(options.scheme, found.scheme.tables, options, found.scheme.embeddings)
    needed = oldest_runtime.of_scheme(found.scheme, found.config, tables)
    return {"scheme": options.scheme, "embeddings": tables}, needed
