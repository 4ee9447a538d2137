"""From integers to what the stage hands back: rounded weights in the model, the log, the table, the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli.context import Applied, Context
from kdcli.export.int8 import Kernel, Stored, quantise_graph
from kdcli.models import compressed, mapped
from kdcli.models.integers import Integers
from kdcli.models.transforms import Quantise
from kdcli.report.schema import Method, Warning_
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import Rounds

INT16_MAX = 32767
"""x86 processors without VNNI add two products of uint8 activations and int8 weights in 16 bits."""

_ROWS = 4096  # of a matrix that are multiplied out together
Rewrite = Callable[[Path, Path], dict[str, Any]]


def quantise(plan: QuantizePlan, matrix: Callable[[str, Any], Integers]) -> dict[str, Integers]:
    """Integers of every layer of a plan, by the name of its weight.

    Args:
        plan: Tables are rounded in its format of embeddings.
        matrix: Rounds the weight of a linear layer or a convolution, given with its name.
    """
    made = {}
    for name, layer in plan.layers.items():
        if isinstance(layer, nn.Embedding):
            made[f"{name}.weight"] = rtn.table(layer.weight, plan.embeddings)
        else:
            made[f"{name}.weight"] = matrix(name, layer)
    return made


def finish(
    context: Context,
    plan: QuantizePlan,
    integers: Mapping[str, Integers],
    *,
    kernel: Kernel = "integer",
    rewrite: Rewrite | None = None,
    activations: Mapping[str, tuple[float, int]] | None = None,
    rounds: Rounds | None = None,
    reduce_range: bool = False,
    detail: Mapping[str, Any] | None = None,
    warnings: list[Warning_] | None = None,
    **options: Any,
) -> Applied:
    """Put the rounded weights into the model of ``context`` and say what was done.

    Args:
        context: Its checkpoint is changed in place: weights and log.
        plan: What was asked.
        integers: Name of a weight -> what replaces it.
        kernel: How the graph multiplies by matrices, where no ``rewrite`` of the scheme's own does it.
        rewrite: The scheme's own way from the float graph to the final one.
        activations: Fixed ranges, for the log: layer -> (scale, zero point).
        rounds: How the graph rounds activations: ``fixed`` where there are ranges, else ``none`` by default.
        reduce_range: Integers of matrices stay within [-64, 64], for the log.
        detail: What else the report should hold.
        warnings: For the report.
        **options: Further fields of :class:`Applied`.
    """
    checkpoint = context.checkpoint
    table = []
    with torch.no_grad():
        for name, matrix in integers.items():
            weight = checkpoint.model.get_parameter(name)
            wrong = size = 0.0
            for old, new in zip(weight.split(_ROWS), matrix.split(_ROWS), strict=True):
                rounded = new.dense()
                size += float(old.norm()) ** 2
                wrong += float((old - rounded).norm()) ** 2
                old.copy_(rounded)
            error = (wrong / size) ** 0.5 if size else 0.0
            table.append(_row(name, weight, error, matrix, plan))
    kept = mapped.integers({name: matrix.cpu() for name, matrix in integers.items()})
    log = checkpoint.log
    # A model that was dequantised on the way in is quantised anew: only the last integers are in the file.
    log.transforms = [t for t in log.transforms if not isinstance(t, Quantise)]
    bits = [m.bits for name, m in kept.items() if not _is_table(name, plan)] or [
        m.bits for m in kept.values()
    ]
    log.transforms.append(
        Quantise(
            scheme=plan.name,
            bits=max(set(bits), key=bits.count),
            reduce_range=reduce_range,
            tensors=sorted(kept),
            layouts=compressed.layouts_for(kept),
            rounds=rounds or ("fixed" if activations else "none"),
            activations=dict(activations or {}),
        )
    )
    count = sum(matrix.values.numel() for matrix in kept.values())
    found: dict[str, Any] = {
        "tensors": len(kept),
        "integer_weights": count,
        "float_weights": sum(p.numel() for p in checkpoint.model.parameters()) - count,
        "stored": _stored(kept, plan),
    }

    def own(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, arrays(kept), kernel=kernel)

    method = Method(name=plan.name, params=plan.params, detail=found | dict(detail or {}), layers=table)
    return Applied(
        checkpoint,
        method,
        integers=kept,
        rewrite_onnx=rewrite or own,
        warnings=list(warnings or []),
        **options,
    )


def largest_of(integers: Mapping[str, Integers], plan: QuantizePlan) -> int:
    """The largest magnitude of an integer that is multiplied by activations."""
    return max((integers[f"{name}.weight"].largest for name in plan.matrices), default=0)


def saturation(largest: int) -> list[Warning_]:
    """Warn when products with uint8 activations can leave 16 bits."""
    if 2 * 255 * largest <= INT16_MAX:
        return []
    text = "weights use the full 8 bits: on x86 processors without VNNI sums can saturate"
    return [Warning_(code="saturation", message=f"{text}; --set reduce_range=true avoids it")]


def arrays(integers: Mapping[str, Integers]) -> dict[str, Stored]:
    """The same for :func:`kdcli.export.int8.quantise_graph`, without a copy."""
    return {
        name: Stored(
            m.values.flatten(1).numpy(),
            m.scale.flatten(1).numpy(),
            None if m.zero is None else m.zero.numpy(),
            m.bits,
        )
        for name, m in integers.items()
    }


def _is_table(name: str, plan: QuantizePlan) -> bool:
    return isinstance(plan.layers.get(name.removesuffix(".weight")), nn.Embedding)


def _stored(integers: Mapping[str, Integers], plan: QuantizePlan) -> dict[str, Any]:
    """Format -> number of weights, of matrices and of tables."""
    found: dict[str, dict[str, int]] = {"matrices": {}, "tables": {}}
    for name, m in integers.items():
        where = found["tables" if _is_table(name, plan) else "matrices"]
        shape = "a scale a row" if m.group is None else f"a scale for {m.group}"
        kind = f"{m.bits} bits, {shape}"
        where[kind] = where.get(kind, 0) + m.values.numel()
    return found


def _row(
    name: str, weight: torch.Tensor, error: float, matrix: Integers, plan: QuantizePlan
) -> dict[str, Any]:
    return {
        "name": name.removesuffix(".weight"),
        "kind": "table" if _is_table(name, plan) else "matrix",
        "shape": list(weight.shape),
        "bits": matrix.bits,
        "group": matrix.group,
        "largest": matrix.largest,
        "relative_error": error,
    }
