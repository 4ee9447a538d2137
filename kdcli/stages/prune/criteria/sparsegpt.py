r"""SparseGPT: weights go one column after another, and the later ones are moved to make up for it.

For one linear layer $W$ (O, I) with inputs $X$ (I, N), $N$ real tokens, the error $\lVert W X - W' X \rVert^2$ is
quadratic with the Hessian $H = \tfrac{2}{N} X X^\top$ for every row. Columns $j$ are settled from left to right.
With the upper Cholesky factor $U$ of the inverse, $H^{-1} = U^\top U$, the square $U_{jj}^2$ is entry $(j, j)$ of
the inverse Hessian of the columns from $j$ on, so that a weight of column $j$ that becomes zero costs, and corrects
the later ones by,

    \text{cost} = \frac{w_j^2}{U_{jj}^2} \qquad w_k \leftarrow w_k - \frac{w_j}{U_{jj}}\, U_{jk}
    \quad \text{for all } k > j

where the cost is twice the loss increase after the best correction. The cheapest weights of every block of columns
go, so many that the matrix loses exactly $\mathrm{round}(\text{sparsity} \cdot O I)$; with N:M the $M - N$ cheapest
of every $M$ neighbours. What the block does to the columns behind it is applied when it is done. Layers follow each
other, each judged on what the pruned ones pass on.

Source: Frantar, Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774, algorithm 1, and the code of the authors (damping, dead inputs). The exact correction is that of
Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon", eq. 5.
Differs: numbers are exact where the code zeroes everything up to a threshold of each block. Inputs
that are always zero go first, but no further than asked; the code zeroes them all. Weights that were zero
before stay zero. The factor is found in float64, so that it exists for small samples. Matrices of one
encoder layer see each other's pruning as well.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.probe import definite
from kdcli.stages.prune.criterion import Criterion, Pattern, WeightJob
from kdcli.stages.prune.masks import largest, rows
from kdcli.stages.prune.statistics import sequentially


class Config(BaseModel):
    """Parameters of SparseGPT."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=1, description="training rows that the inputs of the layers are taken from")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the weights")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, as a share of its mean")
    block: int = Field(128, ge=1, description="columns whose weights are chosen together")


def solve(weight: Tensor, moment: Tensor, pattern: Pattern, config: Config) -> tuple[Tensor, Tensor]:
    """Prune one matrix and correct what is left.

    Args:
        weight: (O, I).
        moment: Mean of x x^T over the layer's inputs x, (I, I) float64.
        pattern: The share of the weights to zero, or N of M.
        config: Damping and block.

    Returns:
        The new weights (O, I) of the dtype and device of ``weight``, and which of them stay.
    """
    upper, dead = _factor(moment, config.damping)
    upper = upper.to(weight.dtype)
    # Transposed, so that a column is contiguous.
    work = weight.detach().to(upper.device).T.clone(memory_format=torch.contiguous_format)
    zero, gone = work == 0, torch.zeros_like(work, dtype=torch.bool)
    block = max(pattern.m, config.block - config.block % pattern.m) if pattern.m else config.block
    quota = _quota(zero, block, pattern.sparsity)
    for number, start in enumerate(range(0, len(work), block)):
        at = slice(start, min(start + block, len(work)))
        part, factor, going = work[at], upper[at, at], gone[at]
        scale = factor.diagonal()
        if not pattern.m:
            going[:] = ~largest(_costs(part, scale, zero[at], dead[at]), quota[number])
        errors = torch.zeros_like(part)
        for j in range(len(part)):
            if pattern.m and j % pattern.m == 0 and j + pattern.m <= len(part):
                near = slice(j, j + pattern.m)
                cost = _costs(part[near], scale[near], zero[at][near], dead[at][near])
                going[near] = ~rows(cost.T, pattern.m - pattern.n).T | zero[at][near]
            errors[j] = part[j].masked_fill(~going[j], 0.0) / scale[j]
            part[j:].addr_(factor[j, j:], errors[j], alpha=-1)
            part[j].masked_fill_(going[j], 0.0)
        work[at.stop :] -= upper[at, at.stop :].T @ errors
    return work.T.contiguous().to(weight), ~gone.T.contiguous().to(weight.device)


def zero(job: WeightJob, config: Config) -> dict[str, Tensor]:
    """Which weights stay; all of them are corrected already, as the later layers had to see it."""
    kept: dict[str, Tensor] = {}

    def decide(name: str, layer: nn.Linear, moment: Tensor) -> None:
        weight, kept[name] = solve(layer.weight, moment, job.pattern, config)
        layer.weight.copy_(weight)

    sequentially(job, "moment", decide)
    return kept


def _factor(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U with H^-1 = U^T U, and which inputs are always zero."""
    hessian = 2 * moment
    dead = hessian.diagonal() == 0
    size = float(hessian.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    hessian.diagonal()[dead] = size  # any positive number: nothing else is tied to them
    hessian.diagonal().add_(damping * size)
    return definite.cholesky(definite.inverse(hessian), upper=True), dead


def _costs(weight: Tensor, diagonal: Tensor, zero: Tensor, dead: Tensor) -> Tensor:
    """Of columns, transposed: (I, O)."""
    cost = (weight / diagonal[:, None]).square().masked_fill(dead[:, None], 0.0)
    return cost.masked_fill(zero, -torch.inf)


def _quota(zero: Tensor, block: int, sparsity: float) -> list[int]:
    """How many weights of every block go: its share, at least those that are zero, together exact."""
    had = [int(part.sum()) for part in zero.split(block)]
    total = max(round(sparsity * zero.numel()), sum(had))
    found: list[int] = []
    done = 0
    for number, part in enumerate(zero.split(block)):
        share = round(sparsity * zero.shape[1] * (number * block + len(part))) - done
        found.append(max(had[number], min(share, total - done - sum(had[number + 1 :]))))
        done += found[-1]
    return found


METHOD = Criterion(config=Config, zero=zero)
