r"""Movement pruning: while the model trains, weights that move towards zero go and those that move away stay.

Every weight $W_{ij}$ has a score $S_{ij}$, at first $b\, |W_{ij}| / \text{mean} |W|$ with $b$ = ``bias``. The
forward pass uses $W' = W \odot M$ with $M = 1$ for the highest scores (all but a share $v$ of them) and 0
elsewhere; the backward pass treats $M$ as $S$ (straight-through), so that, also where $M$ is 0,

    \frac{\partial L}{\partial S_{ij}} = \frac{\partial L}{\partial W'_{ij}}\, W_{ij}

and a score rises as long as the loss wants its weight larger in size. A weight that went can come back. The
share of zeros rises with $t$, the share of the training that is done:

    v(t) = v_f - (v_f - v_0)(1 - u)^3, \qquad u = \frac{t - t_0}{1 - t_0 - t_1} \text{ clipped to } [0, 1]

with $t_0$ = ``warmup`` and $t_1$ = ``cooldown``. With N:M the same share decides how many of every $M$ neighbours
have gone, rounded down, from none to $M - N$.

Sources: Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv:2005.07683, section 3
(scores, straight-through), table 1 (hard movement); Zhu, Gupta 2017, arXiv:1710.01878, eq. 1 (schedule).
Differs: M is found again every ``every`` steps, not at each: sorting all scores would cost as much as the
training. Scope ``global`` is the paper's second variant, there called global. The soft threshold of the paper,
which meets a wanted share only by trial, is left out. Scores are trained with AdamW like the weights, as the
code of the authors does. Their scores start at zero (``bias`` 0), so that the first weights to go are drawn by the
noise of a few steps. It is made for ten epochs of large data: half of MiniLM's weights in one epoch of 217 steps on
SST-2 leave 49.9%, chance, from zero, and 85.2% from magnitudes. 80% in as many steps leave chance from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.prune.criterion import Criterion, Pattern
from kdcli.stages.prune.masks import keep

"""The weights that stay are found by training: there is no ``zero``, but :func:`masked` and :func:`kept`."""


class Config(BaseModel):
    """Parameters of movement pruning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scope: Literal["global", "layer"] = Field(
        "layer", description="rank the scores of all matrices together, or of every matrix by itself"
    )
    score_lr: float = Field(1e-2, gt=0, description="peak learning rate of the scores")
    warmup: float = Field(0.1, ge=0, lt=0.5, description="share of the training before the first weight goes")
    cooldown: float = Field(
        0.3, ge=0, le=0.5, description="share of the training at the final number of zeros"
    )
    bias: float = Field(
        1.0, ge=0, description="how strongly scores favour large weights at first; 0 as in the source"
    )
    every: int = Field(8, ge=1, description="steps between two looks at which scores are the highest")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return grad * mask, (grad * weight).flatten(), None


def masked(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """The weights that the forward pass uses, W * M.

    Args:
        weight: W (O, I).
        scores: S, (O * I,), row by row; receives dL/dW' * W as its gradient.
        mask: M (O, I), bool.
    """
    found: Tensor = _StraightThrough.apply(weight, scores, mask)
    return found


def first_scores(weight: Tensor, config: Config) -> Tensor:
    """The scores before the first step.

    Args:
        weight: W (O, I).
        config: The bias.

    Returns:
        S (O * I,), row by row.
    """
    size = weight.detach().abs()
    found: Tensor = config.bias * (size / size.mean().clamp_min(1e-30)).flatten()
    return found


def pattern_at(done: float, target: Pattern, start: float, config: Config) -> Pattern:
    """What the masks have to look like when the share ``done`` of the training is done.

    Args:
        done: t in [0, 1].
        target: At the end.
        start: Share of the weights that are zero already, v_0.
        config: The schedule.
    """
    span = 1 - config.warmup - config.cooldown
    u = min(1.0, max(0.0, (done - config.warmup) / span))
    if target.m:
        gone = int((target.m - target.n) * (1 - (1 - u) ** 3) + 1e-9)
        return Pattern(gone / target.m, target.m - gone, target.m)
    return Pattern(target.sparsity - (target.sparsity - start) * (1 - u) ** 3)


def kept(
    weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], pattern: Pattern, config: Config
) -> dict[str, Tensor]:
    """Which weights stay, by name: bool (O, I); those that are zero already go first.

    Args:
        weights: W (O, I) by name.
        scores: S (O * I,) of the same names.
        pattern: Of :func:`pattern_at`.
        config: The scope.
    """
    square = {name: scores[name].detach().view(w.shape) for name, w in weights.items()}
    return keep(square, weights, pattern, config.scope)


METHOD = Criterion(config=Config, trained=True)
