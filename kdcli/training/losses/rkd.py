r"""Relational distillation (RKD): distances and angles between rows of a batch are the teacher's.

With $x$ the rows (B, D) of either model, $h$ the Huber loss with threshold 1, and means over distinct indices:

    d_{ij} = \lVert x_i - x_j \rVert \,/\, \text{mean of the distances that are not zero} \\
    a_{ijk} = \cos \angle(x_j - x_i,\; x_k - x_i) \\
    L = w_d\, \underset{ij}{\text{mean}}\; h(d^S_{ij} - d^T_{ij})
    + w_a\, \underset{ijk}{\text{mean}}\; h(a^S_{ijk} - a^T_{ijk})

Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, sections 3.2.1
(distance) and 3.2.2 (angle); the weights 25 and 50 as in mdistiller.
Differs: the paper sums over pairs and triplets; mdistiller takes the mean over all $B^2$ and $B^3$ entries, those
that are zero by definition included, here only over distinct indices. The angles are of the first
``angle_rows`` rows of the batch, because their number grows with the third power.
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


class Config(BaseModel):
    """Parameters of relational distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: Literal["pooled", "logits"] = Field(
        "pooled", description="rows to compare: what the classification head reads, or its logits"
    )
    distance_weight: float = Field(25.0, ge=0, allow_inf_nan=False, description="of the distances")
    angle_weight: float = Field(50.0, ge=0, allow_inf_nan=False, description="of the angles")
    angle_rows: int = Field(
        64,
        ge=3,
        description="rows at the start of a batch whose angles are compared; memory grows with its cube",
    )


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Weighted sum of the losses on distances and on angles.

    The differences of all pairs take B * B * D numbers.

    Args:
        student: Rows (B, D'); computed in float32 at least.
        teacher: Rows (B, D); no gradient flows into them.
        config: Weights and the number of rows whose angles are compared.

    Returns:
        Scalar, dimensionless, at least 0; 0 for a single row.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    ours, theirs = _differences(student.to(dtype)), _differences(teacher.detach().to(dtype))
    rows, angle_rows = len(ours), min(len(ours), config.angle_rows)
    # Pairs and triplets with a repeated index are zero in both models and count neither above nor below.
    distance = F.smooth_l1_loss(_distances(ours), _distances(theirs), reduction="sum")
    angle = F.smooth_l1_loss(_angles(ours, angle_rows), _angles(theirs, angle_rows), reduction="sum")
    pairs = max(1, rows * (rows - 1))
    triplets = max(1, angle_rows * (angle_rows - 1) * (angle_rows - 2))
    return config.distance_weight * distance / pairs + config.angle_weight * angle / triplets


def _differences(rows: Tensor) -> Tensor:
    # From the Gram matrix they would cost less memory, but close rows would lose their distance to rounding.
    return rows - rows[:, None]


def _distances(differences: Tensor) -> Tensor:
    """Distances (B, B) in units of their mean, from differences (B, B, D)."""
    found = torch.linalg.vector_norm(differences, dim=-1)
    mean = found.sum() / (found > 0).sum().clamp(min=1)
    return found / mean.masked_fill(mean == 0, 1)


def _angles(differences: Tensor, rows: int) -> Tensor:
    """Cosines (rows, rows, rows) of the angle at the first index; 0 where two indices coincide."""
    directions = unit_rows(differences[:rows, :rows])
    same = torch.eye(rows, dtype=torch.bool, device=differences.device)
    return (directions @ directions.transpose(1, 2)).masked_fill(same, 0)


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the chosen rows of both."""
    on = setting.config.on
    return loss(chosen(student, on), chosen(teacher, on), setting.config)


METHOD = Loss(
    kind="relation",
    weight=1.0,  # the reference weights 25 and 50 are inside
    config=Config,
    term=term,
    needs=needs,
    check=partial(need_directions, "rkd"),
)
