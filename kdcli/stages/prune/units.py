"""Heads and neurons: cut out, so that the model is smaller and faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcli.context import Applied, Context
from kdcli.families.stack import encoder_layers
from kdcli.report.schema import Method, Warning_
from kdcli.stages.prune import gradual, rows_read
from kdcli.stages.prune.budget import costs, layer_macs, macs_to_remove, table_row
from kdcli.stages.prune.criterion import Price, UnitJob
from kdcli.stages.prune.plan import PrunePlan
from kdcli.training.recovery import recover, zero_shares


@dataclass(frozen=True)
class Amount:
    """How much is cut, where it is not said in multiply-accumulates."""

    price: Price
    remove: float  # in the unit of the price
    recover: bool = True


def apply(context: Context, plan: PrunePlan, amount: Amount | None = None) -> Applied:
    """Cut heads and neurons under one budget of multiply-accumulates, or of ``amount``, then recover."""
    checkpoint, options = context.checkpoint, plan.options
    model, layers = checkpoint.model, encoder_layers(checkpoint.model, checkpoint.family)
    tokens = float(context.encoded["train"].lengths.mean())
    table = [table_row(layer, tokens, "before") for layer in layers]
    had_zeros = zero_shares(checkpoint)
    dense = sum(layer_macs(layer, tokens) for layer in layers)
    by_macs = amount is None
    if amount is None:
        remove = macs_to_remove(
            layers, options.structure, tokens, sparsity=plan.sparsity, budget=options.budget
        )
        amount = Amount(lambda now: costs(now, tokens), remove)
    batches = rows_read.for_criterion(context, plan.criterion, plan.config)
    job = UnitJob(
        model,
        layers,
        options.structure,
        amount.price,
        amount.remove,
        batches,
        iterative=options.schedule != "one-shot",
        seed=context.seed,
        progress=context.progress,
        memo=plan.memo,
        task=checkpoint.task,
    )
    recovery = None
    if options.schedule == "gradual":
        found, recovery = gradual.units(context, plan, job)
    else:
        found = plan.criterion.prune(job, plan.config)
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
    if by_macs and left > (dense - amount.remove) * (1 + 1e-6):
        share, asked = left / dense, 1 - amount.remove / dense
        text = f"{share:.2%} of the encoder's multiply-accumulates are left where {asked:.2%} was asked for"
        warnings.append(
            Warning_(code="budget-missed", message=f"{text}: the last head and the last neuron stay")
        )
    refilled = [name for name, share in zero_shares(checkpoint).items() if share < had_zeros[name] / 2]
    if refilled:
        text = (
            f"{len(refilled)} of the matrices that an earlier stage had set to zero in part were fitted again"
        )
        warnings.append(Warning_(code="zeros-refilled", message=f"{text}: their zeros are gone"))
    if recovery is None and options.epochs and amount.recover:
        recovery = recover(context, **plan.training)
    if recovery is not None:
        detail["recovery"] = recovery
    table = [row | table_row(layer, tokens, "after") for row, layer in zip(table, layers, strict=True)]
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=warnings)
