"""Cut units out of a sub-layer of an encoder and refit its output projection to what the dense model gives.

Shape letters as in :mod:`kdcli.probe.layer_stream`: U input features of the projection, D hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.families.layer import Layer
from kdcli.families.modules import LowRankLinear
from kdcli.probe.raw_moments import RawMoments
from kdcli.stages.prune import output_refit


def cut(layer: Layer, part: str, stay: Sequence[int], moments: RawMoments, ridge: float) -> float:
    """Keep only some units of a sub-layer, in place, and fit its output projection.

    Args:
        layer: With at least one unit in this part.
        part: ``heads`` or ``neurons``.
        stay: Units that stay, in increasing order; may be empty.
        moments: Of the features before the cut, with the dense model's outputs as targets.
        ridge: Pull towards the weights before, a share of the features' mean variance.

    Returns:
        The summed squared error that is left, as a share of the targets' variance.
    """
    width = layer.head_size if part == "heads" else 1
    if part == "heads":
        layer.keep_heads(stay)
    else:
        layer.keep_neurons(stay)
    return _write(layer, part, moments, stay, width, ridge)


def matrix(layer: Layer, part: str) -> tuple[Tensor, Tensor]:
    """Weight (D, U) and bias (D,) of a sub-layer's output projection, factors multiplied out."""
    found = layer.attention_output if part == "heads" else layer.ffn_out
    last = found.second if isinstance(found, LowRankLinear) else found
    weight = last.weight @ found.first.weight if isinstance(found, LowRankLinear) else last.weight
    bias = torch.zeros(len(weight)) if last.bias is None else last.bias
    return weight.detach().double().cpu(), bias.detach().double().cpu()


@contextmanager
def replaced(layer: Layer, part: str, weight: Tensor, bias: Tensor) -> Iterator[None]:
    """Let a sub-layer's output projection compute something else meanwhile."""
    projection = layer.attention_output if part == "heads" else layer.ffn_out
    like = next(projection.parameters())
    w, b = weight.to(like), bias.to(like)
    hook = projection.register_forward_hook(lambda _, args, output: F.linear(args[0], w, b))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _write(
    layer: Layer, part: str, moments: RawMoments, stay: Sequence[int], width: int, ridge: float
) -> float:
    """Refit the output projection of a sub-layer that has only the units ``stay`` left; the error that is left."""
    path = layer.family.attention_output if part == "heads" else layer.family.ffn_out
    found: Any = layer.module.get_submodule(path)
    target = found.second if isinstance(found, LowRankLinear) else found
    if isinstance(found, LowRankLinear):  # the first factor stays, the second one is fitted to what it gives
        first = torch.zeros(found.rank, len(moments.hh), dtype=torch.float64)
        first[:, output_refit.features(stay, width)] = found.first.weight.double().cpu()
        moments, stay, width = moments.through(first), range(found.rank), 1
        before = target.weight.double().cpu()
    else:
        before = torch.zeros(len(moments.t), len(moments.hh), dtype=torch.float64)
        if stay:
            before[:, output_refit.features(stay, width)] = target.weight.double().cpu()
    weight, bias = output_refit.refit(moments, stay, before, width, ridge=ridge)
    if stay:
        target.weight.copy_(weight)
    if target.bias is not None:
        target.bias.copy_(bias)
    return output_refit.residual_error(moments, stay, weight, width)
