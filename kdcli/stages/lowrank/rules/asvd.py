r"""ASVD: inputs with large activations count more, each feature by itself.

    \min \lVert (W - W') S \rVert_F^2 \qquad S = \mathrm{diag}\bigl((\text{mean}\; |x_j|)^\alpha\bigr)
    \qquad W' = [W S]_r\, S^{-1}

with $[\cdot]_r$ the truncated SVD. In the terms of ``kdcli.stages.lowrank.factors``: $M = P^\top P$ and
$K = Q S^2 Q^\top$.

Source: Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
Models", arXiv:2312.05821, section 3.2 (scaling by the mean absolute activation, alpha 0.5).
Differs: padding is left out of the mean; the paper's sensitivity search over ranks is replaced by the one that
all methods share.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.lowrank.factors import Problem
from kdcli.stages.lowrank.rule import LinearRule

_FLOOR = 1e-6


class Config(BaseModel):
    """Parameters of activation-aware factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=8, description="calibration rows, drawn from the training rows by the seed")
    alpha: float = Field(0.5, ge=0, le=2, description="power of the mean absolute activation; 0 is plain SVD")
    centred: bool = Field(False, description="keep the mean output of what is dropped in the bias")


def metrics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """M and K (m, m); see :mod:`kdcli.stages.lowrank.factors`. ``problem.magnitude`` has to be there."""
    assert problem.magnitude is not None
    size = problem.magnitude
    mean = float(size.mean())
    scale = size.clamp(min=_FLOOR * mean) if mean > 0 else size + 1.0
    return problem.plain, (problem.right * scale ** (2 * config.alpha)) @ problem.right.T


METHOD = LinearRule(config=Config, metrics=metrics, needs=frozenset({"magnitude"}))
