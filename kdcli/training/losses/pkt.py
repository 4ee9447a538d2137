r"""Probabilistic transfer (PKT): every row's neighbours in the batch are as probable as for the teacher.

With $\cos_{ij}$ the cosine of rows $i$ and $j$ (B, D) of either model:

    k_{ij} = (1 + \cos_{ij}) / 2 \qquad p_{j|i} = \frac{k_{ij}}{\sum_{l \ne i} k_{il}}, \quad j \ne i \\
    L = \frac{1}{B} \sum_i \mathrm{KL}(p^T_{\cdot|i} \,\Vert\, p^S_{\cdot|i})

The teacher's probabilities weight the comparison: a pair that it finds close costs most if torn apart.

Source: Passalis, Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer",
arXiv:1803.10837, section 3: cosine kernel, conditional probabilities and their divergence.
Differs: the authors' code keeps $j = i$ and takes the mean over all $B^2$ pairs, so that its loss falls with the
batch size; here a row is no neighbour of itself, and the mean is over rows. Their 1e-7 under the logarithm
is here the least value of $k$.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.training.losses.similarity import chosen, need_directions, needs, unit_rows
from kdcli.training.terms import Loss, Setting, Signals, Step

_LEAST = 1e-7


class Config(BaseModel):
    """Parameters of probabilistic transfer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: Literal["pooled", "logits"] = Field(
        "pooled", description="rows to compare: what the classification head reads, or its logits"
    )


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the neighbours' probabilities.

    Args:
        student: Rows (B, D'); computed in float32 at least.
        teacher: Rows (B, D); no gradient flows into them.

    Returns:
        Scalar, in nats, at least 0; 0 for one or two rows.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    ours, theirs = _log_neighbours(student.to(dtype)), _log_neighbours(teacher.detach().to(dtype))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) / len(student)


def _log_neighbours(rows: Tensor) -> Tensor:
    """Log p(j | i) (B, B - 1), in nats."""
    units = unit_rows(rows)
    kernel = ((1 + units @ units.T) / 2).clamp(min=_LEAST)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # The softmax of logarithms divides by the sum.
    return kernel[others].view(len(rows), len(rows) - 1).log().log_softmax(dim=1)


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the chosen rows of both."""
    on = setting.config.on
    return loss(chosen(student, on), chosen(teacher, on))


METHOD = Loss(
    kind="relation",
    # mdistiller's 30000 is for a mean over pairs; over the rows of its batches of 64 that is 470. On clusters of
    # 20 classes in batches of 32 that no longer helps the student, while 50 to 150 does.
    weight=100.0,
    config=Config,
    term=term,
    needs=needs,
    check=partial(need_directions, "pkt"),
)
