"""Quantize: fewer bits for weights, and where a scheme says so for activations."""

from __future__ import annotations

from typing import Any

from kdcli.context import Applied, Context, Stage
from kdcli.report.schema import Warning_
from kdcli.stages.quantize import guard
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.training.recovery import zero_shares


def prepare(context: Context) -> QuantizePlan:
    """Refuse bad options before anything is measured."""
    plan = plans.of(context)
    scheme(plan.scheme).check(context, plan)
    return plan


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Quantise the model of ``context``; its weights become the rounded values, so that it can be measured.

    Raises:
        UsageError: A bad option, or patterns that match nothing or leave nothing.
    """
    module = scheme(plan.scheme)
    had = zero_shares(context.checkpoint)
    applied = guard.apply(context, plan, module)
    filled = [name for name, share in zero_shares(applied.checkpoint).items() if share < had[name] / 2]
    if filled:
        text = f"{len(filled)} matrices had zeros from an earlier stage, and one bit has no zero: they are filled"
        advice = "--scheme ternary keeps them"
        applied.warnings.append(Warning_(code="zeros-refilled", message=f"{text}; {advice}"))
    return applied


STAGE = Stage(prepare, apply)


def scheme(name: str) -> Any:
    """The file of ``stages/quantize/`` that a scheme is in."""
    return plans.stage_file(name)
