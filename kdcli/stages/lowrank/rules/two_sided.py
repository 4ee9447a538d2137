r"""Two-sided whitening: inputs by their covariance, outputs by how much the model's answers feel them.

    \min\; \mathrm{E}\, (x - \mu)^\top (W - W')^\top G\, (W - W') (x - \mu) = \lVert G^{1/2} (W - W') S \rVert_F^2

with $S S^\top = C$ the covariance of the inputs and $G$ the Gauss-Newton matrix of the divergence
$\mathrm{KL}(\text{model} \Vert \text{factorised model})$ for the layer's outputs, by gradients of the outputs
(``curvature``). In $\mu$ and $C$ a token counts as much as the squared gradient of its output to the power
``token_power``. With the power 0 half the minimum is the divergence that is lost, to second order. In the terms of
``kdcli.stages.lowrank.factors``: $M = P^\top G P$ with a share of $P^\top P$, and $K = \mathrm{Cov}(Q x)$.

Source: the closed form of the Kronecker-factored quadratic model of Martens and Grosse 2015,
arXiv:1503.05671, section 3, solved under a rank constraint; DRONE and SVD-LLM (see ``whitening``) are the case
$G = I$, and FWSVD (see ``fwsvd``) is $G$ diagonal and $C = I$.
Differs: labels play no part; gradients are those of random combinations of the logits whose covariance is that of
an answer drawn from the model. Tokens are weighed. Directions that the sample
did not reach count by ``floor`` of the mean.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.lowrank.factors import Problem
from kdcli.stages.lowrank.rule import LinearRule


class Config(BaseModel):
    """Parameters of two-sided factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=8, description="calibration rows, drawn from the training rows by the seed")
    floor: float = Field(
        0.1, gt=0, description="share of the plain error in the weight of an output direction"
    )
    token_power: float = Field(
        0.5,
        ge=0,
        le=1,
        description="tokens count by their squared gradient to this power; 0 counts all alike",
    )
    centred: bool = Field(True, description="keep the mean output of what is dropped in the bias")
    sequential: Literal["targets", "inputs", "off"] = Field(
        "targets",
        description="fit each layer behind the factorised ones: to the dense model's outputs, to its own "
        "weights on the changed inputs, or not at all",
    )
    ridge: float = Field(
        0.3, gt=0, description="how strongly a fit holds to the weights, in units of the inputs' variance"
    )


def metrics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """M and K (m, m); see :mod:`kdcli.stages.lowrank.factors`. ``problem.sensitivity`` has to be there."""
    assert problem.sensitivity is not None
    plain, felt = problem.plain, problem.sensitivity
    size, own = float(felt.trace()), float(plain.trace())
    if size <= 0:  # nothing behind this layer changes with it
        return plain, problem.covariance
    return felt + plain * (config.floor * size / own if own > 0 else 0.0), problem.covariance


METHOD = LinearRule(config=Config, metrics=metrics, needs=frozenset({"sensitivity"}))
