"""Heads and neurons: cut out, so that the model is smaller and faster."""

from __future__ import annotations

from typing import Any

from kdcli.methods.prune_budget import costs, layer_macs, macs_to_remove, table_row
from kdcli.methods.pruning import UnitJob
from kdcli.models.families import encoder_layers
from kdcli.report.schema import Method, Warning_
from kdcli.stages.context import Applied, Context
from kdcli.stages.pruning import sample
from kdcli.stages.pruning.plan import Plan
from kdcli.stages.recovery import recover


def apply(context: Context, plan: Plan) -> Applied:
    """Cut heads and neurons under one budget of multiply-accumulates, then recover."""
    checkpoint, options = context.checkpoint, plan.options
    model, layers = checkpoint.model, encoder_layers(checkpoint.model, checkpoint.family)
    tokens = float(context.encoded["train"].lengths.mean())
    table = [table_row(layer, tokens, "before") for layer in layers]
    dense = sum(layer_macs(layer, tokens) for layer in layers)
    remove = macs_to_remove(layers, options.structure, tokens, sparsity=plan.sparsity, budget=options.budget)
    batches = sample.batches(context, plan.config.samples, plan.config.batch_size)
    job = UnitJob(
        model,
        layers,
        options.structure,
        lambda now: costs(now, tokens),
        remove,
        batches,
        iterative=options.schedule == "iterative",
        seed=context.seed,
        progress=context.progress,
    )
    found = plan.module.prune(job, plan.config)
    if found.cut.heads or found.cut.neurons:
        checkpoint.log.transforms.append(found.cut)
    left = sum(layer_macs(layer, tokens) for layer in layers)
    detail: dict[str, Any] = {
        "sequence": tokens,
        "rows": sum(len(labels) for _, labels in batches),
        "encoder_macs_before": round(dense),
        "encoder_macs_after": round(left),
        "encoder_macs_kept": left / dense,
        "steps": found.trace,
        **found.detail,
    }
    warnings = []
    if left > (dense - remove) * (1 + 1e-6):
        share, asked = left / dense, 1 - remove / dense
        text = f"{share:.2%} of the encoder's multiply-accumulates are left where {asked:.2%} was asked for"
        warnings.append(
            Warning_(code="budget-missed", message=f"{text}: the last head and the last neuron stay")
        )
    if options.epochs:
        detail["recovery"] = recover(context, **plan.training)
    table = [row | table_row(layer, tokens, "after") for row, layer in zip(table, layers, strict=True)]
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=warnings)
