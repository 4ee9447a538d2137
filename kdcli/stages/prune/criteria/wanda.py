r"""Wanda: the weights go whose size times the norm of their input is smallest in their output row.

The score of weight $W_{ij}$, over the $N$ real tokens $x$ of the sample as they reach the layer,

    S_{ij} = |W_{ij}| \cdot \lVert x_j \rVert_2,
    \qquad \lVert x_j \rVert_2 = \sqrt{ \frac{1}{N} \sum_\text{tokens} x_j^2 }

is what the output of row $i$ loses, in root mean square, without that weight alone. Of every row of (O, I) the
$\mathrm{round}(\text{sparsity} \cdot I)$ lowest scores go; with N:M the $M - N$ lowest of every $M$ neighbours. No
weight is changed otherwise, and layers are pruned one after another, so that each is judged on what the pruned ones
before it pass on.

Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv:2306.11695, eq. 1 and section 3, and the code of the authors (running mean of the squared inputs).
Differs: the mean is over real tokens (theirs is over sequences of one length: a constant factor, which
changes no comparison inside a row). Matrices of one encoder layer see each other's pruning as well.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.stages.prune.criterion import Criterion, WeightJob
from kdcli.stages.prune.masks import keep
from kdcli.stages.prune.statistics import sequentially


class Config(BaseModel):
    """Parameters of Wanda."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=1, description="training rows that the norms of the inputs are taken on")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the scores")


def scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Scores of the weights.

    Args:
        weight: (O, I).
        squares: Mean square of every input (I,).

    Returns:
        (O, I), not negative.
    """
    return weight.abs() * squares.sqrt().to(weight)


def zero(job: WeightJob, config: Config) -> dict[str, Tensor]:
    """Which weights stay; those that go are zero already, as the later layers had to see it."""
    kept: dict[str, Tensor] = {}

    def decide(name: str, layer: nn.Linear, squares: Tensor) -> None:
        weight = layer.weight
        kept[name] = keep({name: scores(weight, squares)}, {name: weight}, job.pattern, "row")[name]
        weight.masked_fill_(~kept[name], 0.0)

    sequentially(job, "squares", decide)
    return kept


METHOD = Criterion(config=Config, zero=zero)
