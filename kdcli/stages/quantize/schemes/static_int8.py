r"""Static int8: weights as 8-bit integers with a scale a row, activations rounded with ranges fixed beforehand.

Weights are rounded as dynamic-int8 does. What a matrix is multiplied by gets a range (low, high) from rows of
training data (``--calibration``, ``--calibration-samples``) and is rounded to uint8,

    s = (\text{high} - \text{low}) / 255 \qquad z = \mathrm{round}(-\text{low} / s) \\
    x \approx s \bigl( \mathrm{clip}(\mathrm{round}(x / s) + z,\, 0,\, 255) - z \bigr)

Products are sums of integers; their outputs are floats again, except those of convolutions, which have a range
of their own. Layer norms, GELU, residual sums and softmax are computed in float; ``operators`` rounds their
outputs too, in a graph without fusions.

Fixed ranges save the pass over the activations that finds them at run time, and make an answer independent
of the other rows of its batch. They cost accuracy where the rows of the calibration do not show what comes later.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, sections 2.1 and 2.2.
Differs: ranges are found after training and not during it; outputs of products stay float, because every
operator that follows them in an encoder is one that eight bits would ruin.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kdcli.context import Applied, Context
from kdcli.errors import UsageError, did_you_mean
from kdcli.export import qdq, sessions
from kdcli.models.integers import Integers
from kdcli.stages.quantize import fixed_ranges, integer_weights, layer_inputs
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.ranges import PERCENTILE, Affine, Histogram, Rule, affine, find_range
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import Scheme
from kdcli.stages.quantize.schemes import dynamic_int8

RULES: tuple[str, ...] = get_args(Rule)
RULE = "minmax"


class Config(dynamic_int8.Config):
    """Parameters of static int8 quantisation: those of dynamic-int8 and of the calibration."""

    percentile: float = Field(
        PERCENTILE, gt=50, le=100, description="--calibration percentile: share of values inside, in percent"
    )
    operators: str = Field(
        "",
        description="outputs to round as well, by commas: layernorm, gelu, add (residual sums), softmax; "
        "most models do not survive it",
    )

    @field_validator("operators")
    @classmethod
    def _known(cls, value: str) -> str:
        for name in value.split(",") if value else []:
            if name not in qdq.OPERATORS:
                raise ValueError(f"unknown operator '{name}': {did_you_mean(name, qdq.OPERATORS)}")
        return value


def quantise(weight: Tensor, config: Config) -> Integers:
    """Round a matrix (O, I), or the filters of a convolution (O, I, ...), each row or filter with its own scale.

    Returns:
        Integers of the weight's shape, with scales (O, 1) or (O, 1, ...).
    """
    found = rtn.symmetric(weight.flatten(1), config.bits, limit=dynamic_int8.limit(config))
    if weight.ndim == 2:
        return found
    scale = found.scale.view(-1, *[1] * (weight.ndim - 1))
    return Integers(found.values.view(weight.shape), scale, None, found.bits)


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse rules that do not exist."""
    rule = plan.options.calibration or RULE
    if rule not in RULES:
        raise UsageError(f"unknown --calibration '{rule}': {did_you_mean(rule, RULES)}")
    if rule != "percentile" and "percentile" in plan.settings:
        raise UsageError(f"--set percentile={plan.config.percentile:g} belongs to --calibration percentile")


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Find the ranges, round the weights, and hand back how to write the graph."""
    options, rule, config = plan.options, plan.options.calibration or RULE, plan.config
    model = context.checkpoint.model
    layers = {name: model.get_submodule(name) for name in [*plan.matrices, *plan.convolutions]}
    ranges = _ranges(context, plan, layers, rule)

    def matrix(name: str, layer: nn.Module) -> Integers:
        weight = model.get_parameter(f"{name}.weight")
        return quantise(weight, config)

    integers = integer_weights.quantise(plan, matrix)
    convolutions = {name: layers[name] for name in plan.convolutions}
    outputs = _ranges(context, plan, convolutions, rule, outputs=True) if convolutions else {}
    applied = fixed_ranges.finish(
        context,
        plan,
        integers,
        ranges,
        outputs,
        detail={
            "calibration": rule,
            "calibration_rows": options.calibration_samples,
            "ranges": len(ranges),
        },
        unsigned=config.unsigned,
        reduce_range=config.reduce_range,
        tensors=partial(_tensors, context, plan) if config.operators else None,
    )
    if config.operators:
        applied.fusion = "none"  # what has been fused has no output in between
    return applied


def _tensors(context: Context, plan: QuantizePlan, source: Path) -> dict[str, Affine]:
    """Tensor of a graph -> how it is rounded, for the operators that were asked for; by running that graph."""
    names = qdq.outputs_of(source, plan.config.operators.split(","))
    if not names:
        return {}
    found = {name: Histogram() for name in names}
    shown = source.with_suffix(".showing")
    qdq.showing(source, shown, names)
    try:
        session = sessions.open_session(shown, threads=torch.get_num_threads(), spinning=False)
        for batch in layer_inputs.calibration_batches(context, plan.options.calibration_samples):
            values = session.run(names, sessions.fed(session, batch))
            for name, value in zip(names, values, strict=True):
                found[name].add(torch.from_numpy(value))
    finally:
        shown.unlink(missing_ok=True)
    rule: Any = plan.options.calibration or RULE
    share = plan.config.percentile
    return {name: affine(*find_range(h, rule, percentile=share)) for name, h in found.items()}


def _ranges(
    context: Context, plan: QuantizePlan, layers: dict[str, nn.Module], rule: Any, *, outputs: bool = False
) -> dict[str, Affine]:
    """Layer -> how what it reads, or gives, is rounded."""

    def add(histogram: Histogram, values: Tensor) -> None:
        histogram.add(values)

    rows = plan.options.calibration_samples
    found = layer_inputs.observe(context, layers, rows, Histogram, add, outputs=outputs)
    # Layers that share a tensor share a histogram; its range is searched once.
    once = {id(h): affine(*find_range(h, rule, percentile=plan.config.percentile)) for h in found.values()}
    return {name: once[id(histogram)] for name, histogram in found.items()}


METHOD = Scheme(config=Config, apply=apply, check=check, rounds="fixed", convolutions=True, calibrates=True)
