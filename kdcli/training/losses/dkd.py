r"""Decoupled distillation: the target class and the other classes are imitated with weights of their own.

With $p$ the softmax of logits / $T$, $y$ the target class of a row, $b = (p_y, 1 - p_y)$, and $q$ the softmax over
the $C - 1$ other classes alone, the mean over the rows of

    \text{TCKD} = \mathrm{KL}(b_T \,\Vert\, b_S) \qquad \text{NCKD} = \mathrm{KL}(q_T \,\Vert\, q_S) \\
    L = r\, T^2 \,(w_\text{target}\, \text{TCKD} + w_\text{other}\, \text{NCKD})

with $r = \min(\text{progress} / \text{warmup}, 1)$. Plain distillation is $\text{TCKD} + (1 - p_y)\, \text{NCKD}$
with the teacher's $p_y$: the surer the teacher, the less it says about the other classes. Here it says as much.

Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, section 3: the
identity above and the definition of DKD; weights 1 and 8, T = 4 and the linear warm-up (20 of 240 epochs)
from the authors' CIFAR-100 settings.
Differs: b is computed from the log odds of the target class and q from the other logits alone, so that no
logarithm of a vanished probability is taken. A row without a label has the teacher's most probable class as
its target. The warm-up is a share of the training instead of a number of epochs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.terms import Loss, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of decoupled distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    target_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of the target class's part")
    non_target_weight: float = Field(
        8.0, ge=0, allow_inf_nan=False, description="of the part of the other classes"
    )
    temperature: float = Field(
        4.0,
        gt=0,
        allow_inf_nan=False,
        description="T, dimensionless: logits of both models are divided by it",
    )
    warmup: float = Field(
        0.1, ge=0, le=1, description="share of the training over which the loss rises linearly from zero"
    )


def parts(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both parts of every row, without T^2.

    Args:
        student: Logits (B, C); computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        target: Class (B,) of every row, in [0, C).
        temperature: T.

    Returns:
        TCKD (B,) and NCKD (B,), in nats, at least 0.
    """
    dtype = student.dtype if student.dtype.itemsize >= 4 else torch.float32
    others = torch.ones_like(student, dtype=torch.bool).scatter(1, target[:, None], False)

    def logs(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits.to(dtype) / temperature
        rest = scaled[others].view(len(scaled), -1)
        odds = scaled.gather(1, target[:, None]) - rest.logsumexp(dim=1, keepdim=True)
        return F.logsigmoid(torch.cat([odds, -odds], dim=1)), F.log_softmax(rest, dim=1)

    binary, rest = (
        F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(dim=1)
        for of_student, of_teacher in zip(logs(student), logs(teacher.detach()), strict=True)
    )
    return binary, rest


def loss(student: Tensor, teacher: Tensor, labels: Tensor, config: Config, progress: float = 1.0) -> Tensor:
    """Weighted sum of both parts.

    Args:
        student: Logits (B, C), C at least 3; computed in float32 at least.
        teacher: Logits (B, C); no gradient flows into them.
        labels: (B,) class indices, negative where a row has none.
        config: Weights, temperature and warm-up.
        progress: Share of the training that is done, in [0, 1].

    Returns:
        Scalar, in nats times T^2, at least 0.
    """
    target = torch.where(labels < 0, teacher.detach().argmax(dim=1), labels)
    target_part, non_target_part = parts(student, teacher, target, config.temperature)
    ramp = 1.0 if progress >= config.warmup else progress / config.warmup
    value = config.target_weight * target_part.mean() + config.non_target_weight * non_target_part.mean()
    return ramp * config.temperature**2 * value


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the logits of both, with the labels of the batch."""
    return loss(student.logits, teacher.logits, step.labels, setting.config, step.progress)


def check(setting: Setting) -> None:
    """Refuse a task of fewer than three classes.

    Raises:
        UsageError: There is only one class besides the target.
    """
    classes = setting.student.classes
    if classes < 3:
        raise UsageError(
            f"method 'dkd' needs at least 3 classes and the task has {classes}: besides the target there is"
            " only one, which always has all of the remaining probability, so the non-target part is zero;"
            " use --method response or --method logit-mse"
        )


METHOD = Loss(
    kind="response",
    weight=1.0,  # as in the authors' settings; their CE has weight 1 too
    answers=("one-of",),
    because="DKD splits the target class from the others, and an answer of this kind has no single target",
    instead="response or --method logit-mse",
    config=Config,
    term=term,
    check=check,
)
