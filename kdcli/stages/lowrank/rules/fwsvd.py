r"""Fisher-weighted SVD: rows of weights that the loss depends on are approximated better than the others.

With $F_i$ the empirical Fisher information summed over row $i$ of $W$ (the mean over data rows of the squared
gradients of the loss),

    \min \sum_i F_i\, \lVert W_i - W'_i \rVert^2 \qquad W' = J^{-1} [J W]_r \qquad J = \mathrm{diag}(\sqrt{F})

with $[\cdot]_r$ the truncated SVD. In the terms of ``kdcli.stages.lowrank.factors``:
$M = P^\top \mathrm{diag}(F)\, P$ and $K = Q Q^\top$ for rows that are outputs, $M = P^\top P$ and
$K = Q\, \mathrm{diag}(F)\, Q^\top$ for rows that are inputs.

Source: Hsu et al. 2022, "Language model compression with weighted low-rank factorization", ICLR 2022,
arXiv:2207.00112, equations 6 to 10.
Differs: the rows of $W$ may be its outputs, as ``nn.Linear.weight`` has them (the default), or its inputs, which are
the rows where a layer is written $x W$ (``rows="inputs"``). The root
is the one that makes the objective above come true; implementations without it weigh by F squared. Gradients
are taken row by row of the data, not batch by batch. F has a floor of 1e-8 of its mean.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.lowrank.factors import Problem
from kdcli.stages.lowrank.rule import LinearRule

_FLOOR = 1e-8


class Config(BaseModel):
    """Parameters of Fisher-weighted factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=8, description="calibration rows, drawn from the training rows by the seed")
    rows: Literal["outputs", "inputs"] = Field(
        "outputs", description="the side of the matrix whose features are weighed"
    )
    centred: bool = Field(False, description="keep the mean output of what is dropped in the bias")


def metrics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """M and K (m, m); see :mod:`kdcli.stages.lowrank.factors`. ``problem.fisher`` has to be there."""
    assert problem.fisher is not None
    weights = problem.fisher[0 if config.rows == "outputs" else 1]
    mean = float(weights.mean())
    weights = weights.clamp(min=_FLOOR * mean) if mean > 0 else weights + 1.0
    if config.rows == "outputs":
        return (problem.left.T * weights) @ problem.left, problem.white
    return problem.plain, (problem.right * weights) @ problem.right.T


METHOD = LinearRule(config=Config, metrics=metrics, needs=frozenset({"fisher"}))
