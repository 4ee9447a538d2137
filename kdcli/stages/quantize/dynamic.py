"""``--scheme dynamic-int8``: integers for weights, activations rounded when they are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kdcli.context import Applied, Context
from kdcli.export.int8 import quantise_graph
from kdcli.inputs import sampling
from kdcli.measure import environment
from kdcli.models.integers import Integers
from kdcli.report.schema import Warning_
from kdcli.stages.quantize import integer_weights, smoothing
from kdcli.stages.quantize.plan import QuantizePlan, refuse_calibration, refuse_training
from kdcli.stages.quantize.simulated import Simulation, answer

ROWS = 1000  # of validation, for a choice between forms of the weights

# x86 processors without VNNI add two products of uint8 activations and int8 weights in 16 bits.
INT16_MAX = 32767


ROUNDS = "dynamic"
"""How activations are rounded, for :class:`kdcli.stages.quantize.simulated.Simulation`."""


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse options that this scheme has no use for."""
    refuse_training(plan)
    refuse_calibration(plan)


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every weight by itself; no data is looked at, but where the processor leaves a choice."""
    config, hardware = hardware_choice(context, plan)
    plan = replace(plan, config=config)

    def matrix(name: str, layer: nn.Linear) -> Integers:
        return plan.module.quantise(layer.weight, config)

    integers = integer_weights.quantise(plan, matrix)
    largest = largest_of(integers, plan)
    applied = integer_weights.finish(
        context,
        plan,
        integers,
        rounds="dynamic",
        detail={"largest": largest, "largest_pair_sum": 2 * 255 * largest, "hardware": hardware},
        warnings=[] if config.unsigned else saturation(largest),
    )
    assert applied.integers is not None
    integers.clear()
    stored = integer_weights.arrays(applied.integers)
    smooth = smoothing.vectors(context.checkpoint.model)

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, stored, unsigned=config.unsigned, smooth=smooth)

    applied.rewrite_onnx = rewrite
    return applied


def hardware_choice(context: Context, plan: QuantizePlan) -> tuple[Any, dict[str, Any]]:
    """Which 8-bit form of the weights suits this processor: the plan's Config, perhaps changed, and why.

    With VNNI any form is exact, and the default of 7 bits is, everywhere. Without it 7 bits as int8 and 8 bits
    as uint8 are, and the one that keeps more accuracy on validation rows is taken, unless the user chose.
    """
    found = environment.isa()
    detail: dict[str, Any] = {"isa": found, "vnni": environment.has_vnni()}
    config = plan.config
    named = {"reduce_range", "unsigned"} & set(context.request.common.settings)
    if environment.has_vnni() or named or config.bits < 8:
        return config, detail
    rows = sampling.sample(
        context.encoded["validation"], ROWS, sampling.JUDGING_SEED, context.checkpoint.task
    )
    dense = {f"{name}.weight": layer.weight.detach().clone() for name, layer in plan.matrices.items()}
    base = answer(context.checkpoint, rows)
    scores = {}
    for name, unsigned in (("int8, 7 bits", False), ("uint8", True)):
        form = config.model_copy(update={"unsigned": unsigned, "reduce_range": not unsigned})
        integers = {n: plan.module.quantise(weight, form) for n, weight in dense.items()}
        with Simulation(context.checkpoint, integers, dense, rounds=ROUNDS) as simulation:
            got = simulation.answers(simulation.layers, rows)
        scores[name] = (got.score, -base.divergence(got))
    # As accurate is good enough: the faster form comes first.
    best = max(scores, key=lambda name: (scores[name][0], name == "int8, 7 bits"))
    detail |= {"accuracy": {name: score[0] for name, score in scores.items()}, "chosen": best}
    unsigned = best == "uint8"
    return config.model_copy(update={"unsigned": unsigned, "reduce_range": not unsigned}), detail


def largest_of(integers: dict[str, Integers], plan: QuantizePlan) -> int:
    """The largest magnitude of an integer that is multiplied by activations."""
    return max((integers[f"{name}.weight"].largest for name in plan.matrices), default=0)


def saturation(largest: int) -> list[Warning_]:
    """Warn when products with uint8 activations can leave 16 bits."""
    if 2 * 255 * largest <= INT16_MAX:
        return []
    text = "weights use the full 8 bits: on x86 processors without VNNI sums can saturate"
    return [Warning_(code="saturation", message=f"{text}; --set reduce_range=true avoids it")]
