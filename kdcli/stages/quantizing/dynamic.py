"""``--scheme dynamic-int8``: integers for weights, activations rounded when they are known."""

from __future__ import annotations

from torch import nn

from kdcli.models.integers import Integers
from kdcli.report.schema import Warning_
from kdcli.stages.context import Applied, Context
from kdcli.stages.quantizing import storing
from kdcli.stages.quantizing.plan import Plan, refuse_calibration, refuse_training

# x86 processors without VNNI add two products of uint8 activations and int8 weights in 16 bits.
INT16_MAX = 32767


def check(context: Context, plan: Plan) -> None:
    """Refuse options that this scheme has no use for."""
    refuse_training(plan)
    refuse_calibration(plan)


def apply(context: Context, plan: Plan) -> Applied:
    """Round every weight by itself; no data is looked at."""

    def matrix(name: str, layer: nn.Linear) -> Integers:
        return plan.module.quantise(layer.weight, plan.config)

    integers = storing.quantise(plan, matrix)
    largest = largest_of(integers, plan)
    return storing.finish(
        context,
        plan,
        integers,
        kernel="integer",
        detail={"largest": largest, "largest_pair_sum": 2 * 255 * largest},
        warnings=saturation(largest),
    )


def largest_of(integers: dict[str, Integers], plan: Plan) -> int:
    """The largest magnitude of an integer that is multiplied by activations."""
    found = (integers[f"{name}.weight"].values for name in plan.matrices)
    return max((int(values.int().abs().max()) for values in found), default=0)


def saturation(largest: int) -> list[Warning_]:
    """Warn when products with uint8 activations can leave 16 bits."""
    if 2 * 255 * largest <= INT16_MAX:
        return []
    text = "weights use the full 8 bits: on x86 processors without VNNI sums can saturate"
    return [Warning_(code="saturation", message=f"{text}; --set reduce_range=true avoids it")]
