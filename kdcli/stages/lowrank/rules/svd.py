r"""Plain truncated SVD: the matrix closest to the weights, whatever flows through them.

    W' = U_r D_r V_r^\top

the leading singular values and vectors of $W$, minimises $\lVert W - W' \rVert_F$. In the terms of
``kdcli.stages.lowrank.factors``: $M = P^\top P$ and $K = Q Q^\top$. No data decide anything. With ``centred``,
which is off by default, the mean output of what is dropped moves into the bias.

Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1, 211.
Differs: nothing without ``centred``, which takes a mean that the weights alone do not give.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.stages.lowrank.factors import Problem
from kdcli.stages.lowrank.rule import LinearRule


class Config(BaseModel):
    """Parameters of plain factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(
        1024, ge=8, description="calibration rows that weigh the layers' ranks and measure errors"
    )
    centred: bool = Field(False, description="keep the mean output of what is dropped in the bias")


def metrics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """M and K (m, m); see :mod:`kdcli.stages.lowrank.factors`."""
    return problem.plain, problem.white


METHOD = LinearRule(config=Config, metrics=metrics)
