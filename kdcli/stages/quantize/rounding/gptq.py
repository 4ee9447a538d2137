r"""GPTQ: columns are rounded one after the other, and the columns to come make up for the error of each.

For a layer with weight $W$ (O, I) and inputs $X$ (N, I), the output error $\lVert X (W - Q)^\top \rVert^2$ has the
Hessian $H = 2 X^\top X$. With $U$ the upper Cholesky factor of
$(H + \text{damp} \cdot \overline{\mathrm{diag}\, H}\, I)^{-1}$, for each column $j$ in turn

    Q_j = \mathrm{round}(W_j) \qquad W_k \leftarrow W_k - (W_j - Q_j)\, \frac{U_{jk}}{U_{jj}}
    \quad \text{for all } k > j

where round takes the scale and zero point of the column's block, which are chosen when its first column is due.
A weight that is 0 stays 0 and its error goes to the others too, so what was pruned stays pruned (Frantar and
Alistarh 2023, "SparseGPT", arXiv:2301.00774, section 3.5). An input feature that is always 0 has the weight 0.
With ``order`` the columns with the largest $H_{jj}$ come first, and scales and zero points are chosen beforehand.

$X$ is what the layer reads in the model in which everything before it is rounded already, tables too: layers are
taken in the order in which they run, those that read the same tensor (query, key and value) together.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with the damping and the blocks of 128 columns of section 4.
Differs: the published code leaves tables in float; the order of the sums.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.probe import definite
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import WeightRounding


class Config(BaseModel):
    """Parameters of GPTQ."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    damp: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a part of its mean")
    block: int = Field(128, ge=1, description="columns between two updates of all that follow; only speed")
    order: bool = Field(True, description="columns with the largest inputs first")


def quantise(
    weight: Tensor, hessian: Tensor, bits: int, group: int | None, config: Config, *, symmetric: bool = False
) -> Integers:
    """Quantise a matrix.

    Args:
        weight: W, (O, I) of finite floats.
        hessian: X^T X, (I, I), in any scale; all zeros rounds to the rtn.
        bits: 2 to 8.
        group: Columns of a block, a divisor of I; None for whole rows.
        config: How.
        symmetric: No zero points.
    """
    rows, columns = weight.shape
    group = group or columns
    w = weight.detach().float().clone()
    h = hessian.detach().float().clone()
    h.div_(h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    if not bool(dead.all()):
        w[:, dead] = 0
    pruned = weight == 0
    choose = rtn.symmetric if symmetric else rtn.asymmetric
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    lowest = -highest if symmetric else lowest
    start = choose(w, bits, group=group)
    scale = start.scale.clone()
    zero = torch.zeros_like(scale) if start.zero is None else start.zero.float()
    block_of = torch.arange(columns, device=w.device) // group
    order = torch.arange(columns, device=w.device)
    if config.order:
        order = h.diagonal().argsort(descending=True, stable=True)
        w, h, block_of = w[:, order], h[order][:, order], block_of[order]
        pruned = pruned[:, order]
    h.diagonal().add_(config.damp)
    # In float32 the rounding of a wide layer's Hessian is as large as its smallest eigenvalues.
    h = h.to("cpu" if h.device.type == "mps" else h.device, torch.float64)
    upper = definite.cholesky(definite.inverse(h), upper=True).to(w)
    values = torch.empty_like(w)
    blocks = block_of.tolist()
    for begin in range(0, columns, config.block):
        end = min(begin + config.block, columns)
        errors = torch.empty(rows, end - begin, device=w.device)
        for j in range(begin, end):
            at = blocks[j]
            if not config.order and j % group == 0:
                # Columns of the block that lie behind ``end`` have not had the errors of this one yet.
                coming = w[:, j : j + group].clone()
                if j + group > end and j > begin:
                    coming[:, end - j :] -= errors[:, : j - begin] @ upper[begin:j, end : j + group]
                fresh = choose(coming, bits, group=None)
                scale[:, at] = fresh.scale[:, 0]
                if fresh.zero is not None:
                    zero[:, at] = fresh.zero[:, 0].float()
            s, z = scale[:, at], zero[:, at]
            q = ((w[:, j] / s).round_() + z).clamp_(lowest, highest)
            q = torch.where(pruned[:, j], z, q)
            values[:, j] = q
            error = (w[:, j] - (q - z) * s) / upper[j, j]
            errors[:, j - begin] = error
            w[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
        w[:, end:] -= errors @ upper[begin:end, end:]
    back = torch.empty_like(values)
    back[:, order] = values
    zeros = None if symmetric else zero.to(torch.int8)
    return Integers(back.to(torch.int8), scale, zeros, bits)


METHOD = WeightRounding(config=Config, of_inputs=quantise)
