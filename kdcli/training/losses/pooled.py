r"""Pooled vector: what the student's classification head reads follows what the teacher's head reads.

With $p_S W$ the projected vector of the student and $p_T$ the teacher's, of $D$ features each, the mean over rows of

    L_\text{normalised} = \left\lVert \frac{p_S W}{\lVert p_S W \rVert} - \frac{p_T}{\lVert p_T \rVert} \right\rVert^2
        = 2\, L_\text{cosine} \\
    L_\text{cosine} = 1 - \cos(p_S W,\, p_T) \qquad L_\text{mse} = \frac{1}{D} \lVert p_S W - p_T \rVert^2

It needs no encoder layers, so it works for every student.

Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, eq. 3, for the trained
projection; Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", arXiv:1908.09355,
section 3.2, for the normalised difference.
Differs: both papers compare layers in the middle of the network, this is the last vector before the head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.training.terms import Loss, Needs, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of pooled vector distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    distance: Literal["normalised", "cosine", "mse"] = Field(
        default="normalised",
        description="normalised: squared difference of unit vectors; cosine: half of it; mse: also of the length",
    )


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Distance between the vectors of both models.

    Args:
        student: Vectors (B, D), already projected; computed in float32 at least.
        teacher: Vectors (B, D); no gradient flows into them.
        config: The distance.

    Returns:
        Scalar: normalised in [0, 4], cosine in [0, 2], mse in squared units of the vectors, at least 0.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, theirs = student.to(dtype), teacher.detach().to(dtype)
    if config.distance == "mse":
        return F.mse_loss(own, theirs)
    if config.distance == "cosine":
        return 1 - F.cosine_similarity(own, theirs, dim=-1).mean()
    return (F.normalize(own, dim=-1) - F.normalize(theirs, dim=-1)).square().sum(-1).mean()


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """The pooled vectors of both."""
    return Needs(pooled=True), Needs(pooled=True)


def trained(setting: Setting) -> nn.Module | None:
    """One projection of the student's vector to the teacher's width, where they differ."""
    own, theirs = setting.student.pooled, setting.teacher.pooled
    return None if own == theirs else nn.Linear(own, theirs)


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the pooled vectors."""
    assert student.pooled is not None
    assert teacher.pooled is not None
    vector = student.pooled
    if isinstance(setting.trained, nn.Linear):
        vector = setting.trained(vector.to(setting.trained.weight.dtype))
    return loss(vector, teacher.pooled, setting.config)


METHOD = Loss(
    kind="feature",
    weight=1.0,
    config=Config,
    term=term,
    needs=needs,
    trained=trained,
)
