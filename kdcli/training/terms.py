"""What a distillation method sees of a model, and what it must offer: the contract of ``training/losses/``.

Shape letters: B batch, T tokens, C classes, D features of the teacher, D' of the student, H heads, E features
of a head. Encoder layers count from 1; layer 0 is the output of the embeddings.

A method is one file whose ``METHOD`` is a :class:`Loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from kdcli.registry import MethodSpec
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task


@dataclass(frozen=True)
class Signals:
    """What one model shows of one batch; only what was asked for is there."""

    logits: Tensor  # (B, C); numbers over the standard deviation of the labels
    mask: Tensor  # (B, T) bool, True on real tokens
    pooled: Tensor | None = None  # (B, D), what the classification head reads
    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> (B, T, D)
    #: layer -> (B, H, T, E)
    query: Mapping[int, Tensor] = field(default_factory=dict)
    key: Mapping[int, Tensor] = field(default_factory=dict)
    value: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """Which signals of one model a method reads, besides logits and mask."""

    pooled: bool = False
    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()  # layers whose query, key and value are read

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.pooled or other.pooled, self.hidden | other.hidden, self.attention | other.attention
        )

    def __bool__(self) -> bool:
        return self.pooled or bool(self.hidden) or bool(self.attention)


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; a model that is no stack of encoder layers has ``layers`` 0."""

    layers: int
    hidden: int  # features of a token
    heads: int
    classes: int
    pooled: int  # features that the classification head reads


@dataclass(frozen=True)
class LossSetting:
    """What is fixed during one training."""

    config: Any  # the method's Config
    student: Shape
    teacher: Shape
    pairs: Sequence[tuple[int, int]] = ()  # (student layer, teacher layer), from 1, by the layer map
    trained: nn.Module | None = None  # what :attr:`Loss.trained` returned, on the model's device


@dataclass(frozen=True)
class Step:
    """What changes from batch to batch."""

    labels: Tensor  # of B rows, in the form of the task; numbers over their standard deviation
    progress: float  # share of the training that is done, in [0, 1)
    task: Task = CLASSIFICATION


def _logits_alone(setting: LossSetting) -> tuple[Needs, Needs]:
    return Needs(), Needs()


def _nothing(setting: LossSetting) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Loss(MethodSpec):
    """A distillation method: one term of the sum that is minimised."""

    kind: Literal["response", "feature", "relation", "adversarial"]  # weighted by alpha, beta, gamma, its own
    weight: float  # when neither ``--weight`` nor the option of its kind says another
    #: Picks from the signals of student and teacher what the loss wants, and calls it.
    term: Callable[[Signals, Signals, LossSetting, Step], Tensor]
    #: What it reads of the student and of the teacher.
    needs: Callable[[LossSetting], tuple[Needs, Needs]] = _logits_alone
    #: Raises a UsageError for a setting in which it means nothing: why, and what to use. Returns a sentence for
    #: the user when it falls back to something else.
    check: Callable[[LossSetting], str | None] = _nothing
    #: Further parameters that are trained with the student and thrown away, such as projections.
    trained: Callable[[LossSetting], nn.Module | None] = _nothing
