r"""Correlation distillation (DIST): rows and columns of the probabilities correlate with the teacher's.

With $p$ the softmax of logits / $T$ (B, C), and $\rho$ the Pearson correlation:

    L_\text{inter} = 1 - \frac{1}{B} \sum_i \rho(p^S_{i,:},\, p^T_{i,:}) \\
    L_\text{intra} = 1 - \frac{1}{C} \sum_c \rho(p^S_{:,c},\, p^T_{:,c}) \\
    L = w_\text{inter}\, L_\text{inter} + w_\text{intra}\, L_\text{intra}

times $T^2$ with ``squared_temperature``. A student whose probabilities are a positive affine map of its teacher's,
such as a less certain copy of it, has loss 0.

Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536,
the inter-class and intra-class losses; weights 1 and $T = 1$ from the authors' settings.
Differs: the authors add 1e-8 to the norms; here a row or column that is constant in either model, for which
no correlation exists, is left out of the mean, and an empty mean is 0 (a batch of one row has no intra part).
With two classes every row correlates with +1 or -1 whatever the student does, so only the intra part is used.
$T^2$ is off by default: a correlation does not shrink with $T$, so $T^2$ would not balance anything; some
implementations multiply by it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of correlation distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="T, dimensionless: logits of both models are divided by it",
    )
    inter_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of the correlation within rows")
    intra_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the correlation within columns"
    )
    squared_temperature: bool = Field(
        False, description="multiply by T^2, as some implementations do; it makes no difference at T = 1"
    )


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Missing correlation of the student's probabilities with the teacher's.

    Args:
        student: Logits (B, C); computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        config: Temperature and weights.

    Returns:
        Scalar, dimensionless; each part is in [0, 2] before its weight and T^2.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    ours = F.softmax(student.to(dtype) / config.temperature, dim=1)
    theirs = F.softmax(teacher.detach().to(dtype) / config.temperature, dim=1)
    value = config.intra_weight * _missing(ours.T, theirs.T)
    if student.shape[1] > 2:
        value = value + config.inter_weight * _missing(ours, theirs)
    return value * config.temperature**2 if config.squared_temperature else value


def _missing(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 minus the mean correlation of rows (N, M) that vary in both; 0 if there is none."""
    our_units, our_varies = _standardised(ours)
    their_units, their_varies = _standardised(theirs)
    varies = our_varies & their_varies
    missing = 1 - (our_units * their_units).sum(dim=1)
    return missing.masked_fill(~varies, 0).sum() / varies.sum().clamp(min=1)


def _standardised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, M) with mean 0 and norm 1, and (N,) whether they vary."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # Equal values may differ from their mean by rounding; dividing by that would make a signal of noise.
    rounding = 8 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    varies = norm > rounding
    return centred / norm.masked_fill(~varies, 1), varies[:, 0]


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the logits of both."""
    return loss(student.logits, teacher.logits, setting.config)


def check(setting: Setting) -> str | None:
    """Say that two classes leave only the intra-class part."""
    if setting.student.classes > 2:
        return None
    return (
        "method 'dist' compares only the intra-class relation: with two classes the inter-class correlation"
        " is +1 or -1 whatever the student does, so it teaches nothing"
    )


METHOD = Loss(
    kind="response",
    weight=1.0,
    answers=("one-of",),
    because="DIST correlates the probabilities of classes that exclude each other",
    instead="response or --method logit-mse",
    config=Config,
    term=term,
    check=check,
)
