"""Quantize: fewer bits for weights, and where a scheme says so for activations."""

from __future__ import annotations

from typing import Any

from kdcli.stages.context import Applied, Context
from kdcli.stages.quantizing import guarding
from kdcli.stages.quantizing import plan as plans


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
    return guarding.apply(context, plan, module)


def scheme(name: str) -> Any:
    """The file of ``stages/quantizing/`` that a scheme is in."""
    return plans.stage_file(name)
