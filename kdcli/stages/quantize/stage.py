"""Quantize: fewer bits for weights, and where a scheme says so for activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcli import registry
from kdcli.context import Applied, Context, Stage
from kdcli.foresight import Foreseen, Sizes
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


def chosen(request: Request, detail: Mapping[str, Any]) -> list[str]:
    """What the validation rows chose."""
    options = request.options_as(QuantizeOptions)
    search = detail.get("search")
    found = ["the scheme"] if options.scheme == auto.SCHEME else []
    found += ["the layers that stay in float"] if isinstance(search, Mapping) and search.get("kept") else []
    return found + (["the epoch"] if options.epochs > 1 else [])


def foreseen(request: Request, sizes: Sizes) -> Foreseen:
    """Scheme, tables, and the onnxruntime that the graph needs.

    Raises:
        UsageError: A bad option, or a scheme that cannot work with the task's answers.
    """
    options = request.options_as(QuantizeOptions)
    if options.scheme == auto.SCHEME:
        auto.configured(request.common.settings)
        facts = {"scheme": options.scheme, "embeddings": options.embeddings or "int8"}
        return Foreseen(facts | {"onnxruntime": "as the chosen scheme needs"}, written=sizes.weights // 2)
    found = plans.settle(options.scheme, request.common.settings)
    registry.need_answers({options.scheme: found.scheme}, sizes.task)
    tables = plans.tables_of(options.scheme, found.scheme.tables, options, found.scheme.embeddings)
    needed = oldest_runtime.of_scheme(found.scheme, found.config, tables)
    facts = {"scheme": options.scheme, "embeddings": tables}
    return Foreseen(facts | {"onnxruntime": f"{needed} or newer for model.onnx"}, written=sizes.weights // 2)


STAGE = Stage(prepare, apply, foreseen, chosen)
