r"""Rounding to the nearest (RTN): every weight by itself, without data; what all schemes share.

Shape letters: $O$ rows, $I$ columns, $G$ groups of neighbouring columns that share a scale. With $b$ bits,
symmetric and asymmetric,

    \text{symmetric: } s = \max |w| / L, \quad L = 2^{b-1} - 1, \quad q = \mathrm{round}(w / s) \\
    \text{asymmetric: } s = \frac{\max(w, 0) - \min(w, 0)}{2^b - 1},
    \quad z = -2^{b-1} - \mathrm{round}(\min(w, 0) / s) \\
    q = \mathrm{clip}(\mathrm{round}(w / s) + z,\; -2^{b-1},\; 2^{b-1} - 1)

with ties to even, and $w \approx (q - z)\, s$.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 2.1, equation 1.
Differs: a scale a group of columns and not a tensor; symmetric integers have no zero point and stay within [-L, L].
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kdcli.models.integers import Integers, group_of
from kdcli.stages.quantize.scheme import WeightRounding

TABLE_GROUP = 64
"""Columns of an embedding table of 4 bits that share a scale."""
_ROWS = 4096  # of a table that are rounded together: each by itself, so that little memory is needed


class Config(BaseModel):
    """Rounding to the nearest has no parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def symmetric(weight: Tensor, bits: int, *, group: int | None = None, limit: int | None = None) -> Integers:
    """Round to integers around zero.

    Args:
        weight: (O, I) of finite floats.
        bits: 2 to 8.
        group: Columns that share a scale; it divides I. None: a row has one scale.
        limit: The largest magnitude L; by default all that ``bits`` allow.

    Returns:
        Integers on the weight's device. A group of zeros has scale 1.
    """
    grouped = _grouped(weight, group)
    scale = _usable(grouped.abs().amax(dim=2) / (limit or (1 << (bits - 1)) - 1))
    values = (grouped / scale[..., None]).round_().to(torch.int8)
    return Integers(values.view(weight.shape), scale, None, bits)


def asymmetric(weight: Tensor, bits: int, *, group: int | None = None) -> Integers:
    """Round to integers that span the range of each group, zero included; arguments as in :func:`symmetric`."""
    grouped = _grouped(weight, group)
    low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
    scale = _usable((high - low) / ((1 << bits) - 1))
    lowest = -(1 << (bits - 1))
    zero = lowest - (low / scale).round()
    return with_zero(weight, scale, zero, bits)


def with_zero(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Integers:
    """Round (O, I) with given scales and zero points (O, G); the zero points are integers in float."""
    grouped = weight.detach().float().view(len(weight), scale.shape[1], -1)
    lowest = -(1 << (bits - 1))
    values = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(lowest, -lowest - 1)
    return Integers(values.to(torch.int8).view(weight.shape), scale, zero.to(torch.int8), bits)


def table(weight: Tensor, form: str) -> Integers:
    """Round an embedding table (V, D) for ``--embeddings int8`` or ``int4``.

    Tables are looked up and never multiplied, so 8 bits have their full range; 4 bits have a scale and a zero
    point for every 64 columns.
    """
    parts = [_rounded(part, form) for part in weight.detach().split(_ROWS)]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Integers(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].bits,
    )


def _rounded(rows: Tensor, form: str) -> Integers:
    if form == "int4":
        return asymmetric(rows, 4, group=group_of(rows.shape[1], TABLE_GROUP))
    return symmetric(rows, 8)


def _grouped(weight: Tensor, group: int | None) -> Tensor:
    weight = weight.detach().float()
    return weight.reshape(len(weight), -1, group or weight.shape[1])


def _usable(scale: Tensor) -> Tensor:
    # A subnormal scale has too few digits to divide by; such a group is zero for any practical purpose.
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def quantise(
    weight: Tensor, bits: int, group: int | None, config: Any, *, symmetric: bool = False
) -> Integers:
    """Round a matrix; arguments as in :func:`kdcli.stages.quantize.rounding.hqq.quantise`."""
    return _ROUND[symmetric](weight, bits, group=group)


_ROUND = {True: symmetric, False: asymmetric}

METHOD = WeightRounding(config=Config, of_weight=quantise)
