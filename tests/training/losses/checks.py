"""What every loss on rows is held to. B rows, F features or C logits; losses take student and teacher (B, F)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.training.terms import LossSetting, Needs, Signals, Step

Loss = Callable[[Tensor, Tensor], Tensor]


def features(seed: int, rows: int = 7, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def logits(seed: int, rows: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * features(seed, rows, classes)).to(dtype)


def finite(loss: Loss, student: Tensor, teacher: Tensor, most: float) -> float:
    """A degenerate batch has a finite loss, and gradients below ``most``; the largest of them.

    A division by a norm of 1e-12 would be finite as well, and useless.
    """
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert bool(torch.isfinite(value))
    assert float(gradient.abs().max()) < most
    return float(gradient.abs().max())


def exact_gradients(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Gradients are those of finite differences, and none reaches the teacher; the student's (B, F)."""
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.clone().requires_grad_())
    leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(leaf, other).backward()
    assert other.grad is None
    assert leaf.grad is not None
    return leaf.grad


def lifted(
    loss: Loss,
    naive: Callable[[np.ndarray, np.ndarray], float],
    student: Tensor,
    teacher: Tensor,
    error: float,
) -> None:
    """Half precision is lifted to float32: within ``error``, relative, of the reference in float64."""
    found = loss(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    want = naive(*(rows.bfloat16().double().numpy() for rows in (student, teacher)))
    assert float(found) == pytest.approx(want, rel=error)


def reads_what_was_chosen(
    module: ModuleType, setting: LossSetting, loss: Loss, pooled: list[Tensor], logits: list[Tensor]
) -> None:
    """The term of a method with ``on`` asks for that signal of both models and compares it."""
    asked = Needs(pooled=setting.config.on == "pooled")
    assert module.METHOD.needs(setting) == (asked, asked)
    rows = len(logits[0])
    mask, step = torch.ones(rows, 3, dtype=torch.bool), Step(torch.zeros(rows, dtype=torch.long), 0.5)
    shown = pooled if asked.pooled else [None, None]
    student, teacher = (Signals(z, mask, p) for z, p in zip(logits, shown, strict=True))
    assert torch.equal(
        module.METHOD.term(student, teacher, setting, step), loss(*(pooled if asked.pooled else logits))
    )
