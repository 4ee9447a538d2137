"""The decoupled loss: a naive reference, the identity of the paper, and what a certain teacher still says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.errors import UsageError
from kdcli.training.losses import dkd, response
from kdcli.training.losses.dkd import Config, loss, parts, term
from kdcli.training.terms import LossSetting, Shape, Signals, Step
from tests.training.losses import checks
from tests.training.losses.checks import logits

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def setting(classes: int) -> LossSetting:
    shape = Shape(layers=2, hidden=4, heads=2, classes=classes, pooled=4)
    return LossSetting(Config(), shape, shape)


def naive(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, config: Config) -> float:
    """The paper's definitions on probabilities, one row and one class at a time."""
    total = 0.0
    for s_row, t_row, y in zip(student.astype(float), teacher.astype(float), labels, strict=True):
        p, q = ([math.exp(x / config.temperature) for x in row] for row in (t_row, s_row))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += config.target_weight * p[y] * math.log(p[y] / q[y])
        total += config.target_weight * (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        for c in set(range(len(p))) - {y}:
            a, b = p[c] / (1 - p[y]), q[c] / (1 - q[y])
            total += config.non_target_weight * a * math.log(a / b)
    return config.temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0)])
# Rounding, times the cancellation of small divergences.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_against_the_naive_reference(
    temperature: float, weights: tuple[float, float], dtype: torch.dtype, tolerance: float
) -> None:
    config = Config(temperature=temperature, target_weight=weights[0], non_target_weight=weights[1])
    student, teacher = logits(0, dtype=dtype), logits(1, dtype=dtype)
    found = loss(student, teacher, LABELS, config)
    want = naive(student.numpy(), teacher.numpy(), LABELS.numpy(), config)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(want, rel=tolerance)


def test_plain_distillation_is_the_sum_weighted_by_the_teachers_doubt() -> None:
    student, teacher = logits(0), logits(1)
    target_part, non_target_part = parts(student, teacher, LABELS, 1.0)
    doubt = 1 - teacher.softmax(dim=1).gather(1, LABELS[:, None])[:, 0]
    plain = response.loss(student, teacher, response.Config(temperature=1.0))
    assert float((target_part + doubt * non_target_part).mean()) == pytest.approx(float(plain), rel=1e-12)


def test_a_row_without_a_label_has_the_teachers_choice_as_its_target() -> None:
    student, teacher = logits(0), logits(1)
    some = LABELS.clone()
    some[[1, 4]] = -100
    filled = torch.where(some < 0, teacher.argmax(dim=1), LABELS)
    assert not torch.equal(filled, LABELS)
    want = loss(student, teacher, filled, Config())
    assert torch.equal(loss(student, teacher, some, Config()), want)
    assert float(want) != pytest.approx(float(loss(student, teacher, LABELS, Config())), rel=1e-3)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.9, 1.0)])
def test_the_term_warms_up(progress: float, share: float) -> None:
    mask = torch.ones(6, 3, dtype=torch.bool)
    student, teacher, config = Signals(logits(0), mask), Signals(logits(1), mask), Config(warmup=0.2)
    shape = setting(5).student
    found = term(student, teacher, LossSetting(config, shape, shape), Step(LABELS, progress))
    full = loss(student.logits, teacher.logits, LABELS, config)
    assert float(found) == pytest.approx(share * float(full), rel=1e-12)


def test_no_warm_up_starts_at_once() -> None:
    assert float(loss(logits(0), logits(1), LABELS, Config(warmup=0), progress=0.0)) > 0


@pytest.mark.parametrize("margin", [5.0, 20.0, 200.0])
def test_a_certain_teacher_still_orders_the_other_classes(margin: float) -> None:
    # Both models give the target the same share; they differ in the order of the other classes only.
    teacher = torch.tensor([[margin, 2.0, 0.0, -2.0]], dtype=torch.float64)
    student = torch.tensor([[margin, -2.0, 0.0, 2.0]], dtype=torch.float64).requires_grad_()
    label = torch.tensor([0])
    config = Config(temperature=1.0, target_weight=1.0, non_target_weight=1.0)
    decoupled = torch.autograd.grad(loss(student, teacher, label, config), student)[0][0, 1:]
    plain = response.loss(student, teacher, response.Config(temperature=1.0))
    coupled = torch.autograd.grad(plain, student)[0][0, 1:]
    # The gradient of NCKD is the difference of the softmaxes over the others: it does not know the margin.
    gap = student.detach()[0, 1:].softmax(0) - teacher[0, 1:].softmax(0)
    torch.testing.assert_close(decoupled, gap, rtol=1e-9, atol=1e-12)
    # KL weights the same difference by the doubt, which is below 10 e^-margin.
    assert float(coupled.norm()) < 10 * math.exp(-margin) * float(decoupled.norm())


def test_two_classes_have_no_non_target_part_and_are_refused() -> None:
    _, rest = parts(logits(0, classes=2), logits(1, classes=2), LABELS % 2, 4.0)
    assert float(rest.abs().max()) == 0
    with pytest.raises(UsageError, match=r"at least 3 classes and the task has 2: .* --method response or"):
        dkd.METHOD.check(setting(2))
    assert dkd.METHOD.check(setting(3)) is None


@pytest.mark.parametrize("rows", [1, 4])
def test_vanished_probabilities_give_finite_gradients(rows: int) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]]).repeat(rows, 1).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0]]).repeat(rows, 1)
    value = loss(student, teacher, torch.zeros(rows, dtype=torch.long), Config(temperature=1.0, warmup=0))
    value.backward()
    # TCKD: the log odds of the target are 1e4. NCKD: those of class 1 among the others are -1e4.
    assert float(value.detach()) == pytest.approx(1e4 + 8 * 1e4, rel=1e-6)
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(lambda s, t: loss(s, t, LABELS, Config()), logits(0), logits(1))


def test_half_precision_is_lifted_and_agreement_is_zero() -> None:
    student = logits(0, dtype=torch.bfloat16)
    found = loss(student, logits(1, dtype=torch.bfloat16), LABELS, Config())
    assert found.dtype == torch.float32
    want = naive(
        student.double().numpy(), logits(1, dtype=torch.bfloat16).double().numpy(), LABELS.numpy(), Config()
    )
    assert float(found) == pytest.approx(want, rel=2e-4)
    shifted = logits(0) + F.one_hot(LABELS, 6)[:, :1]
    assert float(loss(logits(0), shifted, LABELS, Config())) == pytest.approx(0, abs=1e-12)
