r"""Response distillation: the student imitates the teacher's softened answers.

With $t_T$ and $s_T$ the softmax of teacher and student logits divided by the temperature $T$, averaged over the rows
(batchmean):

    L = T^2\, \mathrm{KL}(t_T \,\Vert\, s_T)

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
section 2 and eq. 1; the factor $T^2$ from the end of section 2 (gradients shrink as $1/T^2$, eq. 2 to 4 of
section 2.1: for $T \to \infty$ what is left is half the mean squared difference of centred logits).
Differs: the paper minimises the cross entropy $H(t_T, s_T)$; the divergence has the same gradient, because
it differs by the teacher's entropy only, and it is zero when the student agrees.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task
from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of response distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="T, dimensionless: logits of both models are divided by it",
    )


def loss(student: Tensor, teacher: Tensor, config: Config, task: Task = CLASSIFICATION) -> Tensor:
    """Divergence of the student's softened answers from the teacher's.

    Args:
        student: Logits (B, C); computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        config: The temperature.
        task: What an answer is.

    Returns:
        Scalar, in nats times T^2, at least 0.
    """
    # Half precision is lifted before the softmax: its rounding would be larger than the divergence.
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    t = config.temperature
    total = task.divergence(student.to(dtype) / t, teacher.detach().to(dtype) / t, "sum")
    return total / len(student) * t**2


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the logits of both."""
    return loss(student.logits, teacher.logits, setting.config, step.task)


METHOD = Loss(
    kind="response",
    weight=1.0,
    config=Config,
    term=term,
)
