r"""Similarity-preserving distillation (SP): row-normalised Gram matrices of the batch agree.

With $F$ the rows (B, D) of either model, and every row of $G = F F^\top$ (B, B) divided by its Euclidean norm:

    L = \frac{1}{B^2} \lVert G_S - G_T \rVert_F^2

Source: Tung, Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682, section 3:
the loss.
Differs: on the pooled rows or the logits of an encoder instead of the flattened activations of one or several
layers of a CNN. A row of zeros stays zero, where the division would give NaN.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.training.losses.similarity import chosen, need_directions, needs, unit_rows
from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of similarity-preserving distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: Literal["pooled", "logits"] = Field(
        "pooled", description="rows to compare: what the classification head reads, or its logits"
    )


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the row-normalised Gram matrices.

    Args:
        student: Rows (B, D'); computed in float32 at least.
        teacher: Rows (B, D); no gradient flows into them.

    Returns:
        Scalar, dimensionless, in [0, 4 / B].
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    ours, theirs = student.to(dtype), teacher.detach().to(dtype)
    return (unit_rows(ours @ ours.T) - unit_rows(theirs @ theirs.T)).square().mean()


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the chosen rows of both."""
    on = setting.config.on
    return loss(chosen(student, on), chosen(teacher, on))


METHOD = Loss(
    kind="relation",
    # A tenth of mdistiller's 3000, which is for CNNs in batches of 64. On clusters of 20 classes in batches of
    # 32, 3000 starts with a gradient 10 to 30 times that of the cross entropy and helps less than 300.
    weight=300.0,
    config=Config,
    term=term,
    needs=needs,
    check=partial(need_directions, "similarity-preserving"),
)
