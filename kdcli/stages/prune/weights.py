"""Single weights: set to zero, which makes nothing smaller or faster by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcli.context import Applied, Context
from kdcli.errors import InputError
from kdcli.families.modules import projections
from kdcli.families.stack import encoder_layers
from kdcli.models.transforms import Zero
from kdcli.report.schema import Method, Warning_
from kdcli.stages.prune import gradual, learned_masks, rows_read
from kdcli.stages.prune.criterion import Pattern, WeightJob
from kdcli.stages.prune.plan import PrunePlan
from kdcli.training.recovery import recover

_ZEROS = (
    "zeros make nothing smaller or faster: model.safetensors and model.onnx keep their size, and every zero "
    "is still multiplied; only a compressed archive shrinks (--structure heads+neurons really removes parts)"
)


def apply(context: Context, plan: PrunePlan) -> Applied:
    """Zero the weights that the method does not keep; recovery holds them at zero."""
    checkpoint = context.checkpoint
    prefix = checkpoint.family.layers + "."
    matrices = {n: layer for n, layer in projections(checkpoint.model).items() if n.startswith(prefix)}
    if not matrices:
        raise InputError("the model's encoder has no weights left to prune")
    layers = encoder_layers(checkpoint.model, checkpoint.family)
    pattern = plan.n_of_m or Pattern(plan.sparsity or 0.0)
    batches = rows_read.for_criterion(context, plan.criterion, plan.config)
    job = WeightJob(checkpoint.model, layers, matrices, pattern, batches, context.seed, context.progress)
    detail: dict[str, Any] = {"note": _ZEROS}
    found: dict[str, Tensor]
    if plan.criterion.trained:
        found, detail["recovery"] = learned_masks.weights(context, plan, job)
    elif plan.options.schedule == "gradual":
        found, detail["steps"], detail["recovery"] = gradual.weights(context, plan, job)
    else:
        found = plan.criterion.zero(job, plan.config)
    with torch.no_grad():
        for name, layer in matrices.items():
            layer.weight.masked_fill_(~found[name], 0.0)
    zeros = {f"{name}.weight": int((layer.weight == 0).sum()) for name, layer in matrices.items()}
    checkpoint.log.transforms.append(Zero(sparsity=pattern.sparsity, tensors=zeros))
    if plan.options.epochs and "recovery" not in detail:
        detail["recovery"] = recover(context, **plan.training)
    total, gone_now = sum(layer.weight.numel() for layer in matrices.values()), sum(zeros.values())
    detail |= {"weights": total, "zeros": gone_now, "zero_share": gone_now / total}
    table = []
    for one in layers:
        own = [x.weight for x in projections(one.module).values()]
        counts = {"weights": sum(w.numel() for w in own), "zeros": sum(int((w == 0).sum()) for w in own)}
        table.append({"layer": one.index, **counts})
    warnings = [Warning_(code="zeros-not-smaller", message=_ZEROS)]
    rest = [name for name, layer in matrices.items() if pattern.m and layer.in_features % pattern.m]
    if rest:
        detail["not_whole"] = rest
        text = f"in {len(rest)} of {len(matrices)} matrices the input width is no multiple of {pattern.m}"
        warnings.append(
            Warning_(code="rest-dense", message=f"{text}: their last few columns keep all weights")
        )
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=warnings)
