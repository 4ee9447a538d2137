"""Single weights: set to zero, which makes nothing smaller or faster by itself."""

from __future__ import annotations

from typing import Any

import torch

from kdcli.errors import InputError
from kdcli.methods.pruning import Pattern, WeightJob
from kdcli.models.families import encoder_layers
from kdcli.models.layers import projections
from kdcli.models.transforms import Zero
from kdcli.report.schema import Method, Warning_
from kdcli.stages.context import Applied, Context
from kdcli.stages.pruning import sample
from kdcli.stages.pruning.plan import Plan
from kdcli.stages.recovery import recover

_ZEROS = (
    "zeros make nothing smaller or faster: model.safetensors and model.onnx keep their size, and every zero "
    "is still multiplied; only a compressed archive shrinks (--structure heads+neurons really removes parts)"
)


def apply(context: Context, plan: Plan) -> Applied:
    """Zero the weights that the method does not keep; recovery holds them at zero."""
    checkpoint = context.checkpoint
    prefix = checkpoint.family.layers + "."
    matrices = {n: layer for n, layer in projections(checkpoint.model).items() if n.startswith(prefix)}
    if not matrices:
        raise InputError("the model's encoder has no weights left to prune")
    assert plan.sparsity is not None
    samples = getattr(plan.config, "samples", 0)
    batches = sample.batches(context, samples, plan.config.batch_size) if samples else []
    job = WeightJob(
        checkpoint.model, matrices, Pattern(plan.sparsity), batches, context.seed, context.progress
    )
    gone = {name: ~kept for name, kept in plan.module.zero(job, plan.config).items()}

    def zero() -> None:
        with torch.no_grad():
            for name, layer in matrices.items():
                layer.weight.masked_fill_(gone[name], 0.0)

    zero()
    detail: dict[str, Any] = {"note": _ZEROS}
    if plan.options.epochs:
        detail["recovery"] = recover(context, **plan.training, after_step=zero)
    zeros = {f"{name}.weight": int((layer.weight == 0).sum()) for name, layer in matrices.items()}
    checkpoint.log.transforms.append(Zero(sparsity=plan.sparsity, tensors=zeros))
    total, gone_now = sum(layer.weight.numel() for layer in matrices.values()), sum(zeros.values())
    detail |= {"weights": total, "zeros": gone_now, "zero_share": gone_now / total}
    table = []
    for layer in encoder_layers(checkpoint.model, checkpoint.family):
        own = [x.weight for x in projections(layer.module).values()]
        counts = {"weights": sum(w.numel() for w in own), "zeros": sum(int((w == 0).sum()) for w in own)}
        table.append({"layer": layer.index, **counts})
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=[Warning_(code="zeros-not-smaller", message=_ZEROS)])
