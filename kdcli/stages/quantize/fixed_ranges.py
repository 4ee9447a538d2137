"""Hands back a model whose graph rounds what matrices read with fixed ranges, however they were found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdcli.context import Applied, Context
from kdcli.export import qdq
from kdcli.models.integers import Integers
from kdcli.stages.quantize import integer_weights
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.ranges import Affine
from kdcli.stages.quantize.smoothing import smoothquant


def finish(
    context: Context,
    plan: QuantizePlan,
    integers: Mapping[str, Integers],
    ranges: Mapping[str, Affine],
    outputs: Mapping[str, Affine],
    *,
    detail: Mapping[str, Any],
    unsigned: bool,
    reduce_range: bool,
    pack: bool = False,
    tensors: Callable[[Path], Mapping[str, Affine]] | None = None,
) -> Applied:
    """What :func:`kdcli.stages.quantize.integer_weights.finish` does, for integers whose inputs have fixed ranges.

    Args:
        context: Its checkpoint is changed in place: weights and log.
        plan: What was asked.
        integers: Name of a weight -> what replaces it.
        ranges: Layer -> how what it reads is rounded.
        outputs: Convolution -> how what it gives is rounded.
        detail: For the report.
        unsigned: Integers of matrices as uint8 with zero point 128 in the graph.
        reduce_range: They stay within [-64, 64].
        pack: Keep integers of few bits packed in the file.
        tensors: Float graph -> further tensors of it to round, and how.
    """
    largest = integer_weights.largest_of(integers, plan)
    applied = integer_weights.finish(
        context,
        plan,
        integers,
        activations=_pairs(ranges),
        reduce_range=reduce_range,
        detail=dict(detail) | {"largest": largest, "largest_pair_sum": 2 * 255 * largest},
        warnings=[] if unsigned else integer_weights.saturation(largest),
    )
    assert applied.integers is not None
    stored, smooth = integer_weights.arrays(applied.integers), smoothquant.vectors(context.checkpoint.model)

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return qdq.quantise_graph(
            source,
            target,
            stored,
            {f"{name}.weight": pair for name, pair in _pairs(ranges).items()},
            outputs={f"{name}.weight": pair for name, pair in _pairs(outputs).items()},
            unsigned=unsigned,
            smooth=smooth,
            tensors={} if tensors is None else _pairs(tensors(source)),
            pack=pack,
        )

    applied.rewrite_onnx = rewrite
    return applied


def _pairs(ranges: Mapping[str, Affine]) -> dict[str, tuple[float, int]]:
    return {name: (found.scale, found.zero) for name, found in ranges.items()}
