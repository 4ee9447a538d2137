"""Quantize: store weights and embeddings as 8-bit integers, in the checkpoint and in the ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli import methods
from kdcli.errors import UsageError, did_you_mean
from kdcli.export.int8 import quantise_graph
from kdcli.models.transforms import Quantise
from kdcli.report.schema import Method, Warning_
from kdcli.stages.base import QuantizeOptions
from kdcli.stages.context import Applied, Context

EMBEDDINGS = ("int8", "fp32")

# x86 processors without VNNI add two products of uint8 activations and int8 weights in 16 bits.
_INT16_MAX = 32767


@dataclass
class _Plan:
    name: str
    module: Any
    config: Any
    layers: dict[str, nn.Linear | nn.Embedding]
    params: dict[str, Any]


def prepare(context: Context) -> None:
    """Refuse bad options before anything is measured."""
    _plan(context)


def apply(context: Context) -> Applied:
    """Quantise the model of ``context``; its weights become the rounded values, so that it can be measured.

    Raises:
        UsageError: A bad option, or patterns that match nothing or leave nothing.
    """
    plan = _plan(context)
    checkpoint = context.checkpoint
    integers: dict[str, tuple[Tensor, Tensor]] = {}
    table = []
    with torch.no_grad():
        for name, layer in plan.layers.items():
            values, scale = plan.module.quantise(
                layer.weight, plan.config, table=isinstance(layer, nn.Embedding)
            )
            rounded = plan.module.dequantise(values, scale)
            table.append(_row(name, layer, rounded, values))
            layer.weight.copy_(rounded)
            integers[f"{name}.weight"] = (values.cpu(), scale.cpu())
    log = checkpoint.log
    # A model that was dequantised on the way in is quantised anew: only the last integers are in the file.
    log.transforms = [t for t in log.transforms if not isinstance(t, Quantise)]
    log.transforms.append(
        Quantise(
            scheme=plan.name,
            bits=plan.module.BITS,
            reduce_range=plan.config.reduce_range,
            tensors=sorted(integers),
        )
    )
    count = sum(values.numel() for values, _ in integers.values())
    largest = max((row["largest"] for row in table if row["kind"] == "matrix"), default=0)
    detail = {
        "tensors": len(integers),
        "integer_weights": count,
        "float_weights": sum(p.numel() for p in checkpoint.model.parameters()) - count,
        "largest": largest,
        "largest_pair_sum": (pair := 2 * 255 * largest),
    }
    warnings = []
    if pair > _INT16_MAX:
        text = "weights use the full 8 bits: on x86 processors without VNNI sums can saturate"
        warnings.append(Warning_(code="saturation", message=f"{text}; --set reduce_range=true avoids it"))
    stored = {name: (values.numpy(), scale.numpy()) for name, (values, scale) in integers.items()}

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, stored)

    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, integers=integers, rewrite_onnx=rewrite, warnings=warnings)


def _plan(context: Context) -> _Plan:
    options = context.request.options
    assert isinstance(options, QuantizeOptions)
    module = methods.load("quantize", options.scheme)
    if (embeddings := options.embeddings) not in EMBEDDINGS:
        raise UsageError(f"unknown --embeddings '{embeddings}': {did_you_mean(embeddings, EMBEDDINGS)}")
    if options.epochs:
        raise UsageError(
            f"--scheme {options.scheme} trains nothing, so --epochs {options.epochs} has no meaning; leave it at 0"
        )
    if options.calibration is not None:
        raise UsageError(
            f"--scheme {options.scheme} finds the range of activations at run time and uses no --calibration"
        )
    config = methods.parse_settings(module, context.request.common.settings)
    layers = _chosen(context.checkpoint.model, options)
    params = {"scheme": options.scheme, "embeddings": embeddings, "keep_fp32": list(options.keep_fp32)}
    return _Plan(options.scheme, module, config, layers, params | config.model_dump())


def _chosen(model: nn.Module, options: QuantizeOptions) -> dict[str, nn.Linear | nn.Embedding]:
    """Every linear layer, the factors of factorised ones among them, and the embedding tables; less the kept.

    Tables that are no embeddings of tokens, as MPNet's relative position biases, always stay float.

    Raises:
        UsageError: A pattern that matches nothing, or patterns that leave nothing.
    """
    layers: dict[str, nn.Linear | nn.Embedding] = {}
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and name.endswith("_embeddings")
        if isinstance(module, nn.Linear) or (table and options.embeddings == "int8"):
            layers[name] = module
    for pattern in options.keep_fp32:
        if not any(fnmatchcase(name, pattern) for name in layers):
            examples = ", ".join([*list(layers)[:4], list(layers)[-1]])
            raise UsageError(
                f"--keep-fp32 '{pattern}' matches none of the {len(layers)} layers that would be quantised",
                f"* stands for any characters; the names are such as {examples}",
            )
    kept = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in options.keep_fp32)}
    if kept == set(layers):
        raise UsageError("--keep-fp32 leaves nothing to quantise")
    return {name: layer for name, layer in layers.items() if name not in kept}


def _row(name: str, layer: nn.Linear | nn.Embedding, rounded: Tensor, values: Tensor) -> dict[str, Any]:
    norm = float(layer.weight.norm())
    return {
        "name": name,
        "kind": "matrix" if isinstance(layer, nn.Linear) else "table",
        "shape": list(layer.weight.shape),
        "largest": int(values.int().abs().max()),
        "relative_error": float((layer.weight - rounded).norm()) / norm if norm else 0.0,
    }
