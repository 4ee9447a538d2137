"""The correlation loss: NumPy's correlations, its blindness to confidence, and what has no correlation."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from kdcli.training.losses import dist, response
from kdcli.training.losses.dist import Config, loss, term
from kdcli.training.terms import LossSetting, Shape, Signals, Step
from tests.training.losses import checks
from tests.training.losses.checks import logits


def setting(classes: int) -> LossSetting:
    shape = Shape(layers=2, hidden=4, heads=2, classes=classes, pooled=4)
    return LossSetting(Config(), shape, shape)


def naive(student: np.ndarray, teacher: np.ndarray, config: Config) -> float:
    """Means of np.corrcoef over rows and columns."""
    q, p = (np.exp(x.astype(float) / config.temperature) for x in (student, teacher))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    factor = config.temperature**2 if config.squared_temperature else 1.0
    if student.shape[1] == 2:
        inter = 0.0
    return factor * (config.inter_weight * inter + config.intra_weight * intra)


@pytest.mark.parametrize("classes", [2, 5, 151])
@pytest.mark.parametrize(
    "config",
    [Config(), Config(temperature=4.0, squared_temperature=True), Config(inter_weight=0.5, intra_weight=2.0)],
)
# Rounding of the probabilities relative to their spread, which is about 1e-2 of them at T = 4.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_against_numpy(classes: int, config: Config, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = (logits(seed, 12, classes, dtype) for seed in (0, 1))
    found = loss(student, teacher, config)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy(), config), rel=tolerance)


def test_a_less_certain_copy_of_the_teacher_costs_nothing() -> None:
    teacher = logits(1)
    student = (0.5 * teacher.softmax(dim=1) + 0.5 / 5).log()
    # 1 minus a sum of products near 1: a few roundings of float64.
    assert float(loss(student, teacher, Config())) == pytest.approx(0, abs=1e-12)
    assert float(response.loss(student, teacher, response.Config(temperature=1.0))) > 0.1


def test_the_loss_does_not_shrink_with_the_temperature() -> None:
    # Softened probabilities are affine in the logits, and a correlation does not see the factor 1 / T.
    student, teacher = logits(0), logits(1)
    found = float(loss(student, teacher, Config(temperature=1e5, intra_weight=0.0)))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(student.numpy(), teacher.numpy(), strict=True)]
    # The error is of first order in 1 / T.
    assert found == pytest.approx(1 - np.mean(rows), rel=1e-3)


def test_two_classes_leave_the_intra_part() -> None:
    student, teacher = logits(0, classes=2).requires_grad_(), logits(1, classes=2)
    inter, intra = (
        loss(student, teacher, Config(inter_weight=a, intra_weight=b)) for a, b in ((1.0, 0.0), (0.0, 1.0))
    )
    assert inter.item() == 0
    assert intra.item() > 0.01
    assert float(torch.autograd.grad(intra, student)[0].norm()) > 1e-3
    # What the inter part would have been: the correlations are +1 or -1.
    rows = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(student.detach(), teacher, strict=True)])
    assert np.abs(np.abs(rows) - 1).max() < 1e-12
    said = dist.METHOD.check(setting(2))
    assert said is not None
    assert said.startswith("method 'dist' compares only the intra-class relation: with two classes")
    assert dist.METHOD.check(setting(3)) is None


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(
    "student",
    [
        lambda c: logits(0, 1, c, torch.float32),
        lambda c: logits(0, 1, c, torch.float32).repeat(7, 1),
        lambda c: torch.zeros(7, c),
        lambda c: torch.full((7, c), 1.7),
        lambda c: torch.eye(c)[:1].repeat(7, 1) * 1e4,
    ],
    ids=["one row", "identical rows", "zero rows", "constant rows", "certain rows"],
)
def test_without_variance_nothing_is_nan(student: object, classes: int) -> None:
    rows = student(classes)  # type: ignore[operator]
    teacher = logits(1, len(rows), classes, torch.float32)
    # No correlation of rounding errors, whose gradient would be of the order of 1e7.
    checks.finite(partial(loss, config=Config()), rows, teacher, most=1)


def test_a_single_row_has_no_intra_part() -> None:
    student, teacher = logits(0, 1), logits(1, 1)
    assert float(loss(student, teacher, Config(inter_weight=0.0))) == 0
    want = 1 - np.corrcoef(student.softmax(1)[0], teacher.softmax(1)[0])[0, 1]
    assert float(loss(student, teacher, Config())) == pytest.approx(want, rel=1e-10)


def test_a_row_without_variance_does_not_count() -> None:
    student, teacher, config = logits(0), logits(1), Config(intra_weight=0.0)
    more = torch.cat([student, torch.ones(2, 5).double()]), torch.cat([teacher, logits(2, 2)])
    assert float(loss(*more, config)) == pytest.approx(float(loss(student, teacher, config)), rel=1e-12)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(partial(loss, config=Config()), logits(0), logits(1))


def test_the_term_reads_the_logits_and_half_precision_is_lifted() -> None:
    mask = torch.ones(6, 3, dtype=torch.bool)
    student, teacher = (Signals(logits(seed, dtype=torch.bfloat16), mask) for seed in (0, 1))
    found = term(student, teacher, setting(5), Step(torch.zeros(6, dtype=torch.long), 0.5))
    assert found.dtype == torch.float32
    want = naive(student.logits.double().numpy(), teacher.logits.double().numpy(), Config())
    assert float(found) == pytest.approx(want, rel=1e-4)
