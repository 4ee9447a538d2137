"""The loss on standardised logits: a naive reference, its blindness to scale, and rows without a scale."""

from __future__ import annotations

import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch

from kdcli.errors import UsageError
from kdcli.training.losses import logit_standardisation, response
from kdcli.training.losses.logit_standardisation import Config, loss, standardised, term
from kdcli.training.terms import LossSetting, Shape, Signals, Step
from tests.training.losses import checks
from tests.training.losses.checks import logits


def setting(classes: int) -> LossSetting:
    shape = Shape(layers=2, hidden=4, heads=2, classes=classes, pooled=4)
    return LossSetting(Config(), shape, shape)


def naive(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    total = 0.0
    for s_row, t_row in zip(student.astype(float), teacher.astype(float), strict=True):
        shares = []
        for row in (s_row.tolist(), t_row.tolist()):
            mean, deviation = statistics.fmean(row), statistics.stdev(row)
            powers = [math.exp((x - mean) / deviation / temperature) for x in row]
            shares.append([x / sum(powers) for x in powers])
        total += sum(p * math.log(p / q) for q, p in zip(*shares, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("classes", [3, 5, 151])
# Rounding, times the cancellation of small divergences.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_against_the_naive_reference(
    temperature: float, classes: int, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = (logits(seed, classes=classes, dtype=dtype) for seed in (0, 1))
    found = loss(student, teacher, Config(temperature=temperature))
    want = naive(student.numpy(), teacher.numpy(), temperature)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(want, rel=tolerance)


def test_a_student_may_have_a_scale_of_its_own() -> None:
    teacher = logits(1)
    scale, shift = (
        torch.linspace(a, b, 6, dtype=torch.float64)[:, None] for a, b in ((0.05, 3.0), (-5.0, 5.0))
    )
    assert float(loss(teacher * scale + shift, teacher, Config())) == pytest.approx(0, abs=1e-12)
    assert float(response.loss(teacher * scale + shift, teacher, response.Config())) > 0.1
    student = logits(0)
    moved = loss(student * scale + shift, teacher, Config())
    assert float(moved) == pytest.approx(float(loss(student, teacher, Config())), rel=1e-10)


def test_the_gradient_leaves_scale_and_shift_alone() -> None:
    student = logits(0).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, logits(1), Config()), student)
    assert float(gradient.norm()) > 1e-2
    centred = student.detach() - student.detach().mean(dim=1, keepdim=True)
    for along in (gradient.sum(dim=1), (gradient * centred).sum(dim=1)):
        assert float(along.abs().max()) < 1e-12


def test_rows_of_two_logits_hold_only_their_order_and_are_refused() -> None:
    found = standardised(logits(0, classes=2))
    torch.testing.assert_close(found.abs(), torch.full_like(found, math.sqrt(0.5)), rtol=1e-12, atol=0)
    student = logits(0, classes=2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, logits(1, classes=2), Config()), student)
    assert float(gradient.abs().max()) < 1e-12
    with pytest.raises(UsageError, match=r"at least 3 classes and the task has 2: .*0\.7071.* logit-mse"):
        logit_standardisation.METHOD.check(setting(2))
    assert logit_standardisation.METHOD.check(setting(3)) is None


@pytest.mark.parametrize("constant", [0.0, 1.7, -1e4])
@pytest.mark.parametrize("rows", [1, 4])
def test_constant_rows_have_a_gradient_of_ordinary_size(constant: float, rows: int) -> None:
    student, teacher = torch.full((rows, 7), constant), logits(1, rows, 7, torch.float32)
    # T times a difference of probabilities, over the rows; 1e-7 under the fraction would make it 1e6.
    assert checks.finite(partial(loss, config=Config()), student, teacher, most=2) > 1e-3
    # A teacher without an opinion asks for equal probabilities.
    flat = loss(student, torch.full((rows, 7), 0.3), Config())
    assert float(flat) == pytest.approx(0, abs=1e-6)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(partial(loss, config=Config()), logits(0), logits(1))


def test_the_term_reads_the_logits_and_half_precision_is_lifted() -> None:
    mask = torch.ones(6, 3, dtype=torch.bool)
    student, teacher = (Signals(logits(seed, dtype=torch.bfloat16), mask) for seed in (0, 1))
    found = term(student, teacher, setting(5), Step(torch.zeros(6, dtype=torch.long), 0.5))
    assert found.dtype == torch.float32
    want = naive(student.logits.double().numpy(), teacher.logits.double().numpy(), 2.0)
    assert float(found) == pytest.approx(want, rel=2e-4)
