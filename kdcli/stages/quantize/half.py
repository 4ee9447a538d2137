"""``--scheme fp16``: matrices as 16-bit floats."""

from __future__ import annotations

import torch

from kdcli.context import Applied, Context
from kdcli.export.half import halve_graph
from kdcli.models.transforms import Quantise
from kdcli.report.schema import Method
from kdcli.stages.quantize.plan import QuantizePlan, refuse_calibration, refuse_sensitivity, refuse_training


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse options that this scheme has no use for."""
    refuse_training(plan)
    refuse_calibration(plan)
    refuse_sensitivity(plan)


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every matrix and table to float16. The result is dense: other stages may follow."""
    checkpoint = context.checkpoint
    table = []
    with torch.no_grad():
        for name, layer in plan.layers.items():
            rounded = plan.module.quantise(layer.weight).float()
            norm = float(layer.weight.norm())
            error = float((layer.weight - rounded).norm()) / norm if norm else 0.0
            kind = "table" if name in plan.tables else "matrix"
            shape = list(layer.weight.shape)
            table.append({"name": name, "kind": kind, "shape": shape, "bits": 16, "relative_error": error})
            layer.weight.copy_(rounded)
    log = checkpoint.log
    log.transforms = [t for t in log.transforms if not isinstance(t, Quantise)]
    names = frozenset(f"{name}.weight" for name in plan.layers)
    count = sum(layer.weight.numel() for layer in plan.layers.values())
    detail = {"tensors": len(names), "stored": {"float16": count}}
    method = Method(name=plan.scheme, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, half=names, rewrite_onnx=halve_graph, exact=True)
