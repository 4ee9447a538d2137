"""``--scheme static-int8``: integers for weights, activations rounded with ranges from training rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kdcli.context import Applied, Context
from kdcli.errors import UsageError, did_you_mean
from kdcli.export import qdq, sessions
from kdcli.models.integers import Integers
from kdcli.report.schema import Warning_
from kdcli.stages.quantize import integer_weights, smoothing
from kdcli.stages.quantize.dynamic import largest_of, saturation
from kdcli.stages.quantize.observed import observe
from kdcli.stages.quantize.plan import QuantizePlan, refuse_training
from kdcli.stages.quantize.ranges import Affine, Histogram, Rule, affine, find_range

RULES: tuple[str, ...] = get_args(Rule)
RULE = "minmax"
FEW_BITS = ("ternary", "binary")
"""Schemes whose matrices stay packed in a graph of 8-bit products."""
ROUNDS = "fixed"


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse options that this scheme has no use for, and rules that do not exist."""
    refuse_training(plan)
    rule = plan.options.calibration or RULE
    if rule not in RULES:
        raise UsageError(f"unknown --calibration '{rule}': {did_you_mean(rule, RULES)}")
    if rule != "percentile" and "percentile" in plan.settings:
        raise UsageError(f"--set percentile={plan.config.percentile:g} belongs to --calibration percentile")


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Find the ranges, round the weights, and hand back how to write the graph."""
    options, rule = plan.options, plan.options.calibration or RULE
    detail: dict[str, Any] = {"calibration": rule, "calibration_rows": options.calibration_samples}
    model = context.checkpoint.model
    layers = {name: model.get_submodule(name) for name in [*plan.matrices, *plan.convolutions]}
    ranges = _ranges(context, plan, layers, rule)

    def matrix(name: str, layer: nn.Module) -> Integers:
        weight = model.get_parameter(f"{name}.weight")
        return plan.module.quantise(weight, plan.config)

    integers = integer_weights.quantise(plan, matrix)
    largest = largest_of(integers, plan)
    detail |= {"largest": largest, "largest_pair_sum": 2 * 255 * largest, "ranges": len(ranges)}
    convolutions = {name: layers[name] for name in plan.convolutions}
    outputs = _ranges(context, plan, convolutions, rule, outputs=True) if convolutions else {}
    warnings = saturation(largest) if not plan.config.unsigned else []
    applied = finish(context, plan, integers, ranges, outputs, detail=detail, warnings=warnings)
    if plan.config.operators:
        applied.fusion = "none"  # what has been fused has no output in between
    return applied


def finish(
    context: Context,
    plan: QuantizePlan,
    integers: Mapping[str, Integers],
    ranges: Mapping[str, Affine],
    outputs: Mapping[str, Affine],
    *,
    detail: Mapping[str, Any],
    warnings: list[Warning_],
) -> Applied:
    """What :func:`storing.finish` does, for integers whose inputs have fixed ranges.

    Args:
        context: Its checkpoint is changed in place: weights and log.
        plan: What was asked.
        integers: Name of a weight -> what replaces it.
        ranges: Layer -> how what it reads is rounded.
        outputs: Convolution -> how what it gives is rounded.
        detail: For the report.
        warnings: For the report.
    """
    applied = integer_weights.finish(
        context, plan, integers, activations=_pairs(ranges), detail=detail, warnings=warnings
    )
    assert applied.integers is not None
    stored, smooth = integer_weights.arrays(applied.integers), smoothing.vectors(context.checkpoint.model)

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return qdq.quantise_graph(
            source,
            target,
            stored,
            {f"{name}.weight": pair for name, pair in _pairs(ranges).items()},
            outputs={f"{name}.weight": pair for name, pair in _pairs(outputs).items()},
            unsigned=getattr(plan.config, "unsigned", False),
            smooth=smooth,
            tensors=_pairs(_tensors(context, plan, source)),
            pack=plan.scheme in FEW_BITS,
        )

    applied.rewrite_onnx = rewrite
    return applied


def _tensors(context: Context, plan: QuantizePlan, source: Path) -> dict[str, Affine]:
    """Tensor of a graph -> how it is rounded, for the operators that were asked for; by running that graph."""
    operators = getattr(plan.config, "operators", "")
    names = qdq.outputs_of(source, operators.split(",")) if operators else []
    if not names:
        return {}
    found = {name: Histogram() for name in names}
    shown = source.with_suffix(".showing")
    qdq.showing(source, shown, names)
    try:
        session = sessions.open_session(shown, threads=torch.get_num_threads(), spinning=False)
        for batch in integer_weights.calibration_batches(context, plan.options.calibration_samples):
            values = session.run(names, sessions.fed(session, batch))
            for name, value in zip(names, values, strict=True):
                found[name].add(torch.from_numpy(value))
    finally:
        shown.unlink(missing_ok=True)
    rule: Any = plan.options.calibration or RULE
    share = plan.config.percentile
    return {name: affine(*find_range(h, rule, percentile=share)) for name, h in found.items()}


def _pairs(ranges: Mapping[str, Affine]) -> dict[str, tuple[float, int]]:
    return {name: (found.scale, found.zero) for name, found in ranges.items()}


def _ranges(
    context: Context, plan: QuantizePlan, layers: dict[str, nn.Module], rule: Any, *, outputs: bool = False
) -> dict[str, Affine]:
    """Layer -> how what it reads, or gives, is rounded."""

    def add(histogram: Histogram, values: Tensor) -> None:
        histogram.add(values)

    rows = plan.options.calibration_samples
    found = observe(context, layers, rows, Histogram, add, outputs=outputs)
    # Layers that share a tensor share a histogram; its range is searched once.
    once = {id(h): affine(*find_range(h, rule, percentile=plan.config.percentile)) for h in found.values()}
    return {name: once[id(histogram)] for name, histogram in found.items()}
