"""Quantize: fewer bits for weights, and where a scheme says so for activations."""

from __future__ import annotations

from typing import Any

from kdcli.report.schema import Warning_
from kdcli.stages.context import Applied, Context
from kdcli.stages.quantizing import guarding
from kdcli.stages.quantizing import plan as plans
from kdcli.stages.recovery import zero_shares


def prepare(context: Context) -> None:
    """Refuse bad options before anything is measured."""
    plan = plans.of(context)
    scheme(plan.scheme).check(context, plan)


def apply(context: Context) -> Applied:
    """Quantise the model of ``context``; its weights become the rounded values, so that it can be measured.

    Raises:
        UsageError: A bad option, or patterns that match nothing or leave nothing.
    """
    plan = plans.of(context)
    module = scheme(plan.scheme)
    module.check(context, plan)
    had = zero_shares(context.checkpoint)
    applied = guarding.apply(context, plan, module)
    filled = [name for name, share in zero_shares(applied.checkpoint).items() if share < had[name] / 2]
    if filled:
        text = f"{len(filled)} matrices had zeros from an earlier stage, and one bit has no zero: they are filled"
        advice = "--scheme ternary keeps them"
        applied.warnings.append(Warning_(code="zeros-refilled", message=f"{text}; {advice}"))
    return applied


def scheme(name: str) -> Any:
    """The file of ``stages/quantizing/`` that a scheme is in."""
    return plans.stage_file(name)
