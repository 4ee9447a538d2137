r"""Whitened, centred truncated SVD: the factor pair whose outputs differ least on calibration tokens.

For a layer $y = W x + b$ and calibration inputs of mean $\mu$ and covariance $C = S S^\top$ ($S$ by Cholesky,
float64), the matrix of rank $r$ that minimises the mean squared output error

    \mathrm{E}\, \lVert (W - W') (x - \mu) \rVert^2 = \lVert (W - W') S \rVert_F^2 = \sum_{i > r} \sigma_i(W S)^2

is $W' = [W S]_r\, S^{-1}$, with $[\cdot]_r$ the truncated SVD and $\sigma_i$ the singular values. The mean moves
into the bias, $b' = b + (W - W') \mu$, so it costs no rank. In the terms of ``kdcli.stages.lowrank.factors``:
$M = P^\top P$ and $K = \mathrm{Cov}(Q x)$.

Layers are replaced in the order in which they run. Each is fitted to what the dense model's layer gives,
on what the already factorised layers before it give (``sequential``).

Source: Chen et al. 2021, "DRONE: Data-aware Low-rank Compression for Large NLP Models", NeurIPS 2021, and
Wang et al. 2024, "SVD-LLM", arXiv:2403.07378, section 3 (truncation-aware whitening).
Differs: both whiten the inputs and multiply by the inverse of $S$ afterwards, which needs a repair where $C$ is
singular (after GELU it often is). The same $W'$ is found from the narrow side of the layer, where $C$ may be
singular: the eigenvectors of $W C W^\top$ replace the left singular vectors of $W S$. Inputs are centred, padding is
left out, query, key and value share one covariance, and the square roots of the singular values are shared by
the two factors, so that what flows between them has an even scale. SVD-LLM updates the inputs of later
layers only; here the targets stay those of the dense model, and what the residual stream has lost before is
part of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.lowrank.factors import Problem
from kdcli.stages.lowrank.rule import LinearRule


class Config(BaseModel):
    """Parameters of whitened factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=8, description="calibration rows, drawn from the training rows by the seed")
    centred: bool = Field(True, description="keep the mean output of what is dropped in the bias")
    sequential: Literal["targets", "inputs", "off"] = Field(
        "targets",
        description="fit each layer behind the factorised ones: to the dense model's outputs, to its own "
        "weights on the changed inputs, or not at all",
    )
    ridge: float = Field(
        0.3, gt=0, description="how strongly a fit holds to the weights, in units of the inputs' variance"
    )
    share_right: bool = Field(
        False,
        description="one right factor for query, key and value together: two thirds of their parameters at a rank",
    )


def metrics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """M and K (m, m); see :mod:`kdcli.stages.lowrank.factors`."""
    return problem.plain, problem.covariance


METHOD = LinearRule(config=Config, metrics=metrics)
