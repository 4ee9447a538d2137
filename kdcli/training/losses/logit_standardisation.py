r"""Standardised logits: rows of both models get mean 0 and deviation 1 before the softmax.

With $m$ and $d$ the mean and the standard deviation of a row of $C$ logits (B, C), and $T$ the base temperature:

    z' = (z - m) / d \\
    L = T^2\, \mathrm{KL}\bigl( \mathrm{softmax}(z'_T / T) \,\Vert\, \mathrm{softmax}(z'_S / T) \bigr)

averaged over the rows. The student learns how the classes relate to each other and keeps a scale of logits of its
own.

Source: Sun, Ren, Li, Wang, Cao 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427,
algorithm 1 (Z-score as a step before the divergence); base temperature 2 from the authors' settings.
Differs: d divides by C - 1, as the authors' code does; dividing by C only rescales T. They add 1e-7 to d;
here a row whose logits are equal, up to rounding, is divided by 1: its gradient stays of ordinary size
instead of growing by 1e7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of distillation with standardised logits."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    temperature: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="base temperature T, dimensionless: standardised logits of both models are divided by it",
    )


def standardised(logits: Tensor) -> Tensor:
    """Z-scores of every row of logits (B, C), C at least 2; a constant row becomes zero."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1)
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1, keepdim=True)
    # Filled before the root: its slope at zero is infinite.
    return centred / variance.masked_fill(variance <= rounding.square(), 1).sqrt()


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Distance of the softened probabilities after standardisation.

    Args:
        student: Logits (B, C), C at least 3; computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        config: The base temperature.

    Returns:
        Scalar, in nats times T^2, at least 0.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    temperature = config.temperature
    log_student = F.log_softmax(standardised(student.to(dtype)) / temperature, dim=1)
    log_teacher = F.log_softmax(standardised(teacher.detach().to(dtype)) / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the logits of both."""
    return loss(student.logits, teacher.logits, setting.config)


def check(setting: Setting) -> None:
    """Refuse a task of fewer than three classes.

    Raises:
        UsageError: Standardised rows of two logits hold nothing but their order.
    """
    classes = setting.student.classes
    if classes < 3:
        raise UsageError(
            f"method 'logit-standardisation' needs at least 3 classes and the task has {classes}: a row of"
            " two logits always becomes +0.7071 and -0.7071, whatever the model says, so nothing could be"
            " learned; use --method response or --method logit-mse"
        )


METHOD = Loss(
    kind="response",
    # The authors give it 9 next to a CE of 1 at T = 2; here alpha says how much of the sum is response.
    weight=1.0,
    answers=("one-of",),
    because="it standardises the row of logits of classes that exclude each other, which "
    "takes from independent outputs what they say",
    instead="response or --method logit-mse",
    config=Config,
    term=term,
    check=check,
)
