"""``--scheme int4``: weights in blocks, rounded to the nearest, by HQQ or by GPTQ; activations stay in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.export.int8 import quantise_graph
from kdcli.methods.quantize import gptq, hqq
from kdcli.models.integers import Integers
from kdcli.stages.context import Applied, Context
from kdcli.stages.quantizing import storing
from kdcli.stages.quantizing.plan import Plan, refuse_calibration, refuse_training
from kdcli.training.batches import model_inputs

# Hessians of as many layers as fit are summed in one pass over the rows.
_HESSIAN_BYTES = 128 << 20
_BATCH = 8
_WIDEST = 256  # columns of a block that runtimes have kernels for


ROUNDS = "none"


def check(context: Context, plan: Plan) -> None:
    """Refuse options that this scheme has no use for."""
    refuse_training(plan)
    refuse_calibration(plan)
    if plan.config.group & (plan.config.group - 1) or plan.config.group > _WIDEST:
        raise UsageError(f"--set group={plan.config.group}: blocks have 16, 32, 64, 128 or 256 columns")


def apply(context: Context, plan: Plan) -> Applied:
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

    integers = storing.quantise(plan, matrix)
    arrays = storing.arrays({name: m.cpu() for name, m in integers.items()})
    level = 4 if config.compute == "int8" else 0

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, arrays, kernel="blocks", accuracy_level=level)

    return storing.finish(
        context,
        plan,
        integers,
        rewrite=rewrite,
        detail=detail,
        fusion="separate",
        exact=config.compute == "float",
    )


def _gptq(context: Context, plan: Plan) -> dict[str, Integers]:
    """Layer after layer, on the inputs that the layers rounded before it leave."""
    made: dict[str, Integers] = {}
    dense = {name: layer.weight.detach().clone() for name, layer in plan.matrices.items()}
    try:
        for part in _parts(plan.matrices):
            for name, hessian in _hessians(context, plan, part).items():
                layer, config = part[name], plan.config
                group = plan.module.group(layer.weight, config)
                made[name] = gptq.quantise(
                    layer.weight, hessian, config.bits, group, plan.inner, symmetric=config.symmetric
                )
            with torch.no_grad():
                for name, layer in part.items():
                    layer.weight.copy_(made[name].dense())
    finally:
        with torch.no_grad():
            for name, weight in dense.items():
                plan.matrices[name].weight.copy_(weight)
    return made


def _parts(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """The layers in their order, as many at a time as have room for their Hessians."""
    part: dict[str, nn.Linear] = {}
    used = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if part and used + size > _HESSIAN_BYTES:
            yield part
            part, used = {}, 0
        part[name], used = layer, used + size
    yield part


@torch.inference_mode()
def _hessians(context: Context, plan: Plan, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """X^T X (I, I) of each layer's inputs over the calibration rows; constant in the number of rows."""
    model = context.checkpoint.model
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name].addmm_(x.T, x)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in storing.calibration_batches(context, plan.options.calibration_samples, _BATCH):
            model(**model_inputs(model, batch, context.device))
    finally:
        for handle in handles:
            handle.remove()
    return sums
