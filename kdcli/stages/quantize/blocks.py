"""``--scheme int4``: weights in blocks, rounded to the nearest, by HQQ or by GPTQ; activations stay in float."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.export.int8 import quantise_graph
from kdcli.inputs.feeding import model_inputs
from kdcli.models.integers import Integers
from kdcli.probe import in_order
from kdcli.stages.quantize import integer_weights, nearest
from kdcli.stages.quantize.plan import QuantizePlan, refuse_calibration, refuse_training
from kdcli.stages.quantize.schemes import gptq, hqq

_BATCH = 8
_WIDEST = 256  # columns of a block that runtimes have kernels for


ROUNDS = "none"


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse options that this scheme has no use for."""
    refuse_training(plan)
    refuse_calibration(plan)
    if plan.config.group & (plan.config.group - 1) or plan.config.group > _WIDEST:
        raise UsageError(f"--set group={plan.config.group}: blocks have 16, 32, 64, 128 or 256 columns")


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every weight of the plan."""
    config, module = plan.config, plan.module
    detail: dict[str, Any] = {}
    if config.rounding == "gptq" and plan.matrices:
        found = _gptq(context, plan)
        detail["calibration_rows"] = min(plan.options.calibration_samples, len(context.encoded["train"]))
    else:
        found = {}

    def matrix(name: str, layer: nn.Linear) -> Integers:
        if name in found:
            return found[name]
        if config.rounding == "hqq":
            group = module.group(layer.weight, config)
            return hqq.quantise(layer.weight, config.bits, group, plan.inner, symmetric=config.symmetric)
        return module.quantise(layer.weight, config)

    integers = integer_weights.quantise(plan, matrix)
    arrays = integer_weights.arrays({name: m.cpu() for name, m in integers.items()})
    level = 4 if config.compute == "int8" else 0

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, arrays, kernel="blocks", accuracy_level=level)

    return integer_weights.finish(
        context,
        plan,
        integers,
        rewrite=rewrite,
        detail=detail,
        fusion="separate",
        exact=config.compute == "float",
    )


def _gptq(context: Context, plan: QuantizePlan) -> dict[str, Integers]:
    """Layer after layer, on the inputs that tables and layers give that are rounded already."""
    made: dict[str, Integers] = {}
    model, config = context.checkpoint.model, plan.config

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in integer_weights.calibration_batches(context, plan.options.calibration_samples, _BATCH):
            yield model_inputs(model, batch, context.device)

    def take(name: str, products: Tensor) -> None:
        weight = plan.matrices[name].weight
        group = plan.module.group(weight, config)
        made[name] = gptq.quantise(
            weight, products, config.bits, group, plan.inner, symmetric=config.symmetric
        )
        with torch.no_grad():
            weight.copy_(made[name].dense())

    before = {name: layer.weight.detach().clone() for name, layer in plan.layers.items()}
    order = in_order.order_of(model, plan.matrices, next(batches()))
    walk = in_order.Walk(model, order, batches)
    try:
        with torch.no_grad():
            for table in plan.tables.values():
                table.weight.copy_(nearest.table(table.weight, plan.embeddings).dense())
        with context.progress.task("gptq", len(order.groups)) as task:
            for group in order.groups:
                products = walk.products(group, plan.matrices)
                for name in group.names:
                    take(name, products)
                task.advance()
        for name in set(plan.matrices) - set(made):
            columns = plan.matrices[name].in_features
            take(name, torch.zeros(columns, columns, device=context.device))  # it never runs
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                plan.layers[name].weight.copy_(weight)
    return made
