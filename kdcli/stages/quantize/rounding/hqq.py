r"""HQQ: integers, scales and zero points that minimise a sparse error of the weights, without data.

For a block $w$ of weights, with $r(q) = (q - z)\, s$ and $p < 1$,

    \min_{q, s, z, e}\; \lVert e \rVert_p^p + \frac{\beta}{2} \lVert w - r(q) - e \rVert^2

in turns, $\beta$ growing by ``kappa`` each time, with $d = w - r(q)$:

    q = \mathrm{clip}(\mathrm{round}(w / s) + z) \\
    e = \mathrm{sign}(d) \max\bigl(0,\; |d| - |d|^{p-1} / \beta\bigr) \\
    z = \mathrm{round}\bigl(\text{mean}\,(q - (w - e) / s)\bigr) \\
    s = \langle q - z,\, w - e \rangle \,/\, \lVert q - z \rVert^2

A block keeps the best of all rounds by $\lVert w - r(q) \rVert_p$, the first of which is rounding to the nearest.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (technical report of
Mobius Labs), equations 2 to 5, and its defaults for p, beta and kappa.
Differs: zero points are integers, because the file formats want them so, and what that loses is won back by
also solving for the scale, which the source leaves as it was.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import WeightRounding


class Config(BaseModel):
    """Parameters of half-quadratic quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    p: float = Field(0.7, gt=0, le=1, description="norm of the error; less lets outliers be wrong")
    beta: float = Field(10.0, gt=0, description="weight of the squared error in the first round")
    kappa: float = Field(1.01, ge=1, description="growth of beta a round")
    iterations: int = Field(20, ge=1, description="rounds")


def quantise(
    weight: Tensor, bits: int, group: int | None, config: Config, *, symmetric: bool = False
) -> Integers:
    """Quantise a matrix.

    Args:
        weight: (O, I) of finite floats.
        bits: 2 to 8.
        group: Columns of a block, a divisor of I; None for whole rows.
        config: The rounds.
        symmetric: Zero points stay 0.
    """
    start = rtn.symmetric if symmetric else rtn.asymmetric
    made = start(weight, bits, group=group)
    w = weight.detach().float().view(len(weight), made.scale.shape[1], -1)
    scale = made.scale[..., None]
    zero = torch.zeros_like(scale) if made.zero is None else made.zero.float()[..., None]
    lowest = -(1 << (bits - 1))
    highest = (1 << (bits - 1)) - 1
    lowest = -highest if symmetric else lowest
    beta = config.beta
    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero
    for _ in range(config.iterations + 1):
        q = ((w / scale).round_() + zero).clamp_(lowest, highest)
        d = w - (q - zero) * scale
        error = d.abs().pow(config.p).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        size = d.abs()
        # The shrinkage of a zero is zero; its power would be infinite.
        e = torch.where(
            size > 0, d.sign() * (size - size.clamp(min=1e-12).pow(config.p - 1) / beta).clamp_(min=0), d
        )
        target = w - e
        if not symmetric:
            zero = (q - target / scale).mean(2, keepdim=True).round_().clamp_(lowest, highest)
        steps = q - zero
        square = (steps * steps).sum(2, keepdim=True)
        fitted = (steps * target).sum(2, keepdim=True) / square
        scale = torch.where((square > 0) & (fitted > torch.finfo(torch.float32).tiny), fitted, scale)
        beta *= config.kappa
    values = ((w / best_scale).round_() + best_zero).clamp_(lowest, highest)
    return Integers(
        values.to(torch.int8).view(weight.shape),
        best_scale[..., 0].contiguous(),
        None if symmetric else best_zero[..., 0].to(torch.int8),
        bits,
    )


METHOD = WeightRounding(config=Config, of_weight=quantise)
