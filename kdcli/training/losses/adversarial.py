r"""Adversarial distillation (experimental): the student learns to pass for the teacher before a discriminator.

A discriminator $D$, a perceptron with one hidden layer, says with which probability a vector is the teacher's.
With $t$ the teacher's vectors and $s$ the student's (the projected pooled vector, or the logits) of $B$ rows, every
step has one update of each side, first the discriminator's, with $s$ and $t$ constant, then the student's, with $D$
constant (0 during the warm-up):

    L_D = \frac{1}{2B} \sum_i \bigl[ -\log D(t_i) - \log(1 - D(s_i)) \bigr] \\
    L_\text{student} = \frac{1}{B} \sum_i -\log D(s_i)

Both are $\log 2$ when $D$ cannot tell them apart. Only the distributions are compared, not row with row, so this is
no replacement for a response term, and it is fragile: keep the weight at 0.1 or below.

The discriminator has an AdamW of its own and learns from the first step; during the warm-up (a share of the
training) the student is left alone, so that it meets a discriminator that knows something. The projection is
trained with the student and by this loss only.

What ``trained`` returns has the projection alone among its parameters and in its ``state_dict``.
``tensors()`` and ``restore()`` carry the rest: the discriminator and the state of its optimizer, without which
a resumed training would differ.

Source: Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661, section 3 and algorithm 1
(the student's loss is the form of section 3 that does not saturate); Xu, Hsu, Huang 2018, "Training Shallow and
Thin Networks for Acceleration via Knowledge Distillation with Conditional Adversarial Networks",
arXiv:1709.00513 (a discriminator between logits of teacher and student).
Differs: that discriminator also predicts the class, this one only tells the two models apart. The warm-up is
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.func import functional_call

from kdcli.training.terms import Loss, Needs, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of adversarial distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: Literal["pooled", "logits"] = Field(
        default="pooled",
        description="vectors to tell apart: what the classification head reads, or the logits",
    )
    warmup: float = Field(
        default=0.2, ge=0, lt=1, description="share of the training in which only the discriminator learns"
    )
    neurons: int = Field(default=128, ge=1, description="width of the discriminator's hidden layer")
    lr: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="learning rate of the discriminator"
    )


def loss(judged: Tensor, teacher: bool) -> Tensor:
    """Cross entropy of the discriminator's verdicts with one answer for all rows.

    Args:
        judged: Logits (B,) that a vector is the teacher's.
        teacher: The answer.

    Returns:
        Scalar in nats, at least 0: -log D, or -log(1 - D), averaged over the rows.
    """
    return F.softplus(-judged if teacher else judged).mean()


class Adversary(nn.Module):
    """The discriminator and its optimizer; move it to its device before the first update.

    Args:
        width: Features of a vector.
        config: Its size and its rate.
    """

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, config.neurons), nn.GELU(), nn.Linear(config.neurons, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=config.lr)

    def update(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One step of the discriminator.

        Args:
            student: Vectors (B, D); no gradient flows into them.
            teacher: Vectors (B, D); no gradient flows into them.

        Returns:
            Its loss before the step, scalar without gradient, in nats.
        """
        own, theirs = self.judge(student.detach()), self.judge(teacher.detach())
        value = (loss(own, False) + loss(theirs, True)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def fool(self, student: Tensor) -> Tensor:
        """The student's loss; its gradient reaches the vectors (B, D) and not the discriminator."""
        constants = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        return loss(functional_call(self.net, constants, (self._like(student),)).squeeze(-1), True)

    def judge(self, vectors: Tensor) -> Tensor:
        """Logits (B,) that the vectors (B, D) are the teacher's."""
        judged: Tensor = self.net(self._like(vectors)).squeeze(-1)
        return judged

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that decides the next updates: parameters and the optimizer's state."""
        found = {f"net.{name}": value.detach().clone() for name, value in self.net.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": value.detach().clone() for name, value in state.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors` on an adversary of the same sizes."""
        net, state = {}, dict[int, dict[str, Tensor]]()
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "net":
                net[name] = value
            else:
                index, _, name = name.partition(".")
                state.setdefault(int(index), {})[name] = value.clone()
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _like(self, vectors: Tensor) -> Tensor:
        return vectors.to(next(self.net.parameters()).dtype)


class Game(nn.Module):
    """The projection, and out of the student's optimizer's sight the adversary.

    Args:
        projection: D' -> D; None where the widths are equal.
        adversary: Kept out of ``parameters()`` and ``state_dict()``, but moved with this module.
    """

    def __init__(self, projection: nn.Linear | None, adversary: Adversary) -> None:
        super().__init__()
        self.projection = projection
        self._hidden = (adversary,)  # a module in a tuple is no submodule

    @property
    def adversary(self) -> Adversary:
        """The discriminator and its optimizer."""
        return self._hidden[0]

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the student's vectors (B, D') to (B, D)."""
        if self.projection is None:
            return vectors
        projected: Tensor = self.projection(vectors.to(self.projection.weight.dtype))
        return projected

    def tensors(self) -> dict[str, Tensor]:
        """What ``state_dict()`` does not hold; see :meth:`Adversary.tensors`."""
        return self.adversary.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        self.adversary.restore(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What .to(), .cuda() and .double() go through.
        self.adversary._apply(fn, recurse)
        return super()._apply(fn, recurse)


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """The pooled vectors of both, unless the logits are compared."""
    pooled = setting.config.on == "pooled"
    return Needs(pooled=pooled), Needs(pooled=pooled)


def adversary(setting: Setting) -> Adversary:
    """A new discriminator for the teacher's width."""
    teacher = setting.teacher
    return Adversary(teacher.pooled if setting.config.on == "pooled" else teacher.classes, setting.config)


def trained(setting: Setting) -> nn.Module:
    """The projection D' -> D of pooled vectors, where the widths differ, with the adversary behind it."""
    own, theirs = setting.student.pooled, setting.teacher.pooled
    projects = setting.config.on == "pooled" and own != theirs
    return Game(nn.Linear(own, theirs) if projects else None, adversary(setting))


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """Let the discriminator learn one step, then return the student's loss; 0 during the warm-up."""
    game = setting.trained
    assert isinstance(game, Game)
    own, theirs = student.logits, teacher.logits
    if setting.config.on == "pooled":
        assert student.pooled is not None
        assert teacher.pooled is not None
        own, theirs = student.pooled, teacher.pooled
    own = game(own)
    game.adversary.update(own, theirs)
    if step.progress < setting.config.warmup:
        return own.new_zeros(())
    return game.adversary.fool(own)


METHOD = Loss(
    kind="adversarial",
    weight=0.1,
    config=Config,
    term=term,
    needs=needs,
    trained=trained,
)
