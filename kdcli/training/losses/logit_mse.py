r"""Logit distillation: the mean squared error between the logits of both models.

With $z_S$ and $z_T$ the logits (B, C), each row minus its mean when ``centred``:

    L = \frac{1}{BC} \sum_{i,c} (z^S_{ic} - z^T_{ic})^2

It is the limit of response distillation: for $T \to \infty$, $T^2\, \mathrm{KL}(t_T \Vert s_T)$ tends to half of the
centred loss. To first order in $1/T$ the probabilities are $1/C + (z - \bar z) / (C T)$, and KL near the
uniform distribution is $C/2$ times the sum over classes of the squared differences of probabilities.

Sources: Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184, the squared error on
logits of section 2.2 (uncentred); Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.1, where matching
zero-mean logits is the limit of a high temperature.
Differs: Ba and Caruana sum over the classes and halve; here it is the mean over them, so that the size of
the loss does not grow with the number of classes. Rows are centred by default, because a constant that is
added to a row of logits changes no probability, and imitating it would spend the student's capacity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of logit distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    centred: bool = Field(
        default=True,
        description="subtract from each row its mean, which says nothing where one of several labels is right",
    )


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Mean squared difference of the logits.

    Args:
        student: Logits (B, C); computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        config: Whether rows are centred.

    Returns:
        Scalar, in squared logits, at least 0.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if config.centred:
        student = student - student.mean(dim=-1, keepdim=True)
        teacher = teacher - teacher.mean(dim=-1, keepdim=True)
    return F.mse_loss(student, teacher)


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the logits of both; their mean is only free where they stand for one of several labels."""
    config = setting.config
    if step.task.kind != "one-of":
        config = config.model_copy(update={"centred": False})
    return loss(student.logits, teacher.logits, config)


METHOD = Loss(
    kind="response",
    # Twice the response loss at a high temperature, so alpha keeps its meaning within a factor of two.
    weight=1.0,
    config=Config,
    term=term,
)
