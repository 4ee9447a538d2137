"""``lowrank --merge``: multiply factors back where the one matrix is smaller or faster than the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.families.modules import LowRankLinear
from kdcli.models import conv_factors, transforms
from kdcli.models.conv_factors import FactorisedConv
from kdcli.probe.product_clock import Clock, torch_milliseconds
from kdcli.report.schema import Method, Warning_
from kdcli.stages.lowrank import rank_budget
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.lowrank.patterns import patterns_leave

# Less is within the noise of two clocks.
_FASTER = 0.95


def apply(context: Context, params: dict[str, Any]) -> Applied:
    """Merge the factor pairs of ``context`` that do not pay, in place.

    A pair is merged when its matrix has no more parameters, or takes less than 95% of its time at batch 1.
    Layers that share a right factor are merged together or not at all.

    Raises:
        UsageError: The model has no factors.
    """
    checkpoint = context.checkpoint
    options = context.request.options_as(LowRankOptions)
    model = checkpoint.model
    pairs: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear | FactorisedConv)
    }
    if not pairs:
        raise UsageError(
            "--merge: the model has no factors that could be multiplied", "kdcli lowrank makes them"
        )
    pairs = patterns_leave(pairs, options.include, options.exclude, "factorised layer")
    clock = Clock(max(1, round(float(context.encoded["train"].lengths.mean()))))
    together = {id(m.first): n for n, m in pairs.items() if isinstance(m, LowRankLinear)}
    groups: dict[str, list[str]] = {}
    for name, pair in pairs.items():
        groups.setdefault(together[id(pair.first)] if isinstance(pair, LowRankLinear) else name, []).append(
            name
        )
    table, done = [], []
    for names in groups.values():
        rows = [_row(name, pairs[name], len(names), clock) for name in names]
        before, after = (sum(row[f"parameters_{w}"] for row in rows) for w in ("before", "after"))
        slow, fast = (sum(row[f"latency_{w}_ms"] for row in rows) for w in ("before", "after"))
        merge = after <= before or fast < _FASTER * slow
        for row in rows:
            row["merged"] = merge
            if not merge:
                row |= {
                    "parameters_after": row["parameters_before"],
                    "latency_after_ms": row["latency_before_ms"],
                }
            table.append(row)
        if merge:
            done += names
    for name in done:
        model.set_submodule(name, merged(pairs[name]))
    transforms.merged(checkpoint.log, done)
    detail = {
        "merged": len(done),
        "kept_factorised": len(table) - len(done),
        "parameters_before": sum(row["parameters_before"] for row in table),
        "parameters_after": sum(row["parameters_after"] for row in table),
    }
    warnings = []
    if not done:
        text = "nothing was merged, the model is unchanged: all factors are smaller and not slower than their product"
        warnings.append(Warning_(code="nothing-merged", message=text))
    return Applied(
        checkpoint, Method(name="merge", params=params, detail=detail, layers=table), warnings=warnings
    )


@torch.no_grad()
def merged(pair: nn.Module) -> nn.Module:
    """The one layer that a factorised one stands for, multiplied in float64."""
    if isinstance(pair, FactorisedConv):
        return conv_factors.merge(pair)
    assert isinstance(pair, LowRankLinear)
    first, second = pair.first.weight, pair.second.weight
    layer = nn.Linear(pair.in_features, pair.out_features, bias=pair.bias is not None)
    layer.to(device=first.device, dtype=first.dtype).train(pair.training)
    layer.weight.copy_(second.double() @ first.double())
    if pair.bias is not None:
        layer.bias.copy_(pair.bias)
    return layer


def _row(name: str, pair: nn.Module, sharing: int, clock: Clock) -> dict[str, Any]:
    if isinstance(pair, FactorisedConv):
        dense = conv_factors.merge(pair)
        shape = (1, pair.in_channels, *[max(16, 2 * k) for k in pair.kernel_size])
        x = torch.zeros(shape, device=next(pair.parameters()).device)
        return {
            "name": name,
            "shape": list(dense.weight.shape),  # type: ignore[arg-type]
            "rank": list(pair.ranks),
            "parameters_before": sum(p.numel() for p in pair.parameters()),
            "parameters_after": sum(p.numel() for p in dense.parameters()),
            "latency_before_ms": torch_milliseconds(pair, x),
            "latency_after_ms": torch_milliseconds(dense, x),
        }
    assert isinstance(pair, LowRankLinear)
    outputs, inputs, rank = pair.out_features, pair.in_features, pair.rank
    size = rank_budget.LayerSize(outputs, inputs, 0 if pair.bias is None else outputs)
    return {
        "name": name,
        "shape": [outputs, inputs],
        "rank": rank,
        "parameters_before": size.parameters(rank) - (rank * inputs * (sharing - 1)) // sharing,
        "parameters_after": size.dense,
        "latency_before_ms": clock.product(outputs, inputs, rank),
        "latency_after_ms": clock.product(outputs, inputs, None),
    }
