r"""Similarity distillation: rows of a batch are as similar to each other as the teacher finds them.

With $X$ the rows (B, D) of either model, each of length 1 under the cosine kernel, and $G = X X^\top$ (B, B):

    L = \frac{1}{B^2} \lVert G_S - G_T \rVert_F^2

Only similarities are compared, so the widths of both models may differ and nothing is projected.

Source: Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang 2019, "Correlation Congruence for Knowledge Distillation",
arXiv:1904.01802, the loss on the batch's correlation matrices; its inner product is kernel "dot".
Differs: the cosine is the default, because inner products grow with the width and the scale of the features,
which differ between teacher and student. The paper's Gaussian kernel, expanded in a series, is not offered.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.terms import Loss, Needs, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of similarity distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: Literal["pooled", "logits"] = Field(
        "pooled", description="rows to compare: what the classification head reads, or its logits"
    )
    kernel: Literal["cosine", "dot"] = Field(
        "cosine", description="similarity of two rows: of their directions, or their inner product"
    )


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (..., D) of length 1; a row of zeros stays zero, with a gradient of ordinary size."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, 1)


def chosen(signals: Signals, on: Literal["pooled", "logits"]) -> Tensor:
    """The rows (B, D) that a relation method compares."""
    if on == "logits":
        return signals.logits
    assert signals.pooled is not None, "asked for in needs()"
    return signals.pooled


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Mean squared difference of the similarity matrices.

    Args:
        student: Rows (B, D'); computed in float32 at least.
        teacher: Rows (B, D); no gradient flows into them.
        config: The kernel.

    Returns:
        Scalar, in squared similarities, at least 0; at most 4 with the cosine.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    ours, theirs = student.to(dtype), teacher.detach().to(dtype)
    if config.kernel == "cosine":
        ours, theirs = unit_rows(ours), unit_rows(theirs)
    return (ours @ ours.T - theirs @ theirs.T).square().mean()


def need_directions(name: str, setting: Setting) -> None:
    """Refuse rows of one number, of which a method that compares directions sees the sign alone.

    Raises:
        UsageError: The logits are to be compared, and there is only one.
    """
    if setting.config.on == "logits" and setting.teacher.classes < 2:
        raise UsageError(
            f"method '{name}' compares the directions of rows, and of a single logit that is its sign",
            f"leave out --set {name}.on=logits",
        )


def check(setting: Setting) -> None:
    """Refuse the directions of a single logit; see :func:`need_directions`."""
    if setting.config.kernel == "cosine":
        need_directions("similarity", setting)


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """The pooled rows of both, unless the logits are compared."""
    asked = Needs(pooled=setting.config.on == "pooled")
    return asked, asked


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the chosen rows of both."""
    on = setting.config.on
    return loss(chosen(student, on), chosen(teacher, on), setting.config)


METHOD = Loss(
    kind="relation",
    # No reference weight is known. On clusters of 20 classes in batches of 32, 10 and 30 helped the student most
    # of 1 to 100, and at 10 the gradient starts at a fifth to four times that of the cross entropy.
    weight=10.0,
    config=Config,
    term=term,
    needs=needs,
    check=check,
)
