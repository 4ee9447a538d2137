"""Margin-MSE: the differences between the scores of a batch follow the teacher's, whatever their level.

With s and t the scores (B,) of student and teacher, and the mean over the pairs i < j of the batch:

    loss = mean of ((s_i - s_j) - (t_i - t_j))^2 / 2

A constant added to all scores of either model changes nothing: a ranking has none, and a small student need not spend
its capacity on the teacher's. Where the numbers themselves count (RMSE), the labels or a second term tie them down.
With d = s - t the loss is the unbiased variance of d, which is how it is computed: B numbers, not B^2.

Source: Hofstätter, Althammer, Schröder, Sertkan, Hanbury 2020, "Improving Efficient Neural Ranking Models with
Cross-Architecture Knowledge Distillation", arXiv:2010.02666, the margin mean squared error.
Differs: the paper takes one pair a query, a relevant and an irrelevant passage; here it is every pair of the batch, of
one query or of two, because batches are cut by length. Halved, as the response loss of a number.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kdcli.training.terms import Loss, LossSetting, Signals, Step


class Config(BaseModel):
    """It has no parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of the margins of all pairs.

    Args:
        student: Scores (B, 1); computed in float32 at least.
        teacher: Scores (B, 1); no gradient flows into them.

    Returns:
        Scalar, in squared units of the scores (of which training leaves none), at least 0; 0 for a single row.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    d = (student.to(dtype) - teacher.detach().to(dtype)).flatten()
    return (d - d.mean()).square().sum() / max(1, len(d) - 1)


def term(student: Signals, teacher: Signals, setting: LossSetting, step: Step) -> Tensor:
    """The loss on the logits of both."""
    return loss(student.logits, teacher.logits)


METHOD = Loss(
    kind="response",
    weight=1.0,
    config=Config,
    term=term,
    answers=("number",),
    because="it compares the differences of scores",
    instead="response or --method logit-mse",
)
