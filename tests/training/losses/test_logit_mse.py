"""The logit loss: a naive reference, what centring takes away, its limit, and margins that KL cannot see."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from kdcli import tasks
from kdcli.training.losses import response
from kdcli.training.losses.logit_mse import Config, loss, term
from kdcli.training.terms import LossSetting, Shape, Signals, Step
from tests.training.losses import checks


def logits(
    rows: int = 6, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)


def naive(student: np.ndarray, teacher: np.ndarray, centred: bool) -> float:
    total = 0.0
    for s_row, t_row in zip(student.astype(float), teacher.astype(float), strict=True):
        for s, t in zip(s_row, t_row, strict=True):
            gap = (s - s_row.mean()) - (t - t_row.mean()) if centred else s - t
            total += gap**2
    return total / student.size


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("classes", [2, 5, 151])
# Relative rounding of float64 and float32, times a few hundred additions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_the_naive_reference(
    centred: bool, classes: int, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = (logits(classes=classes, seed=seed, dtype=dtype) for seed in (0, 1))
    found = loss(student, teacher, Config(centred=centred))
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy(), centred), rel=tolerance)


def test_centring_takes_away_exactly_the_constants_of_the_rows() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    constants = (student - teacher).mean(dim=1).square().mean()
    centred, plain = (loss(student, teacher, Config(centred=c)) for c in (True, False))
    assert float(plain) == pytest.approx(float(centred + constants), rel=1e-12)
    shifted = teacher + torch.arange(6.0, dtype=torch.float64)[:, None]
    assert float(loss(student, shifted, Config())) == pytest.approx(float(centred), rel=1e-12)


def test_twice_the_response_loss_at_a_high_temperature() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    half = 0.5 * float(loss(student, teacher, Config()))
    far = [
        abs(float(response.loss(student, teacher, response.Config(temperature=t))) / half - 1)
        for t in (1e2, 1e3, 1e4)
    ]
    assert far[2] < 1e-3
    # The error is of first order in 1 / T.
    assert far[0] / far[1] == pytest.approx(10, rel=0.2)
    assert far[1] / far[2] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("classes", [2, 10])
def test_a_margin_teaches_where_both_models_are_certain(classes: int) -> None:
    # Margins of 20 and 40: both give the first class a probability of 1 - 1e-8 or more, so KL is silent.
    student, teacher = torch.zeros(1, classes).double(), torch.zeros(1, classes).double()
    student[0, 0], teacher[0, 0] = 20.0, 40.0
    sizes = []
    for value in (
        lambda s: loss(s, teacher, Config()),
        lambda s: response.loss(s, teacher, response.Config(temperature=1.0)),
    ):
        leaf = student.clone().requires_grad_()
        sizes.append(float(torch.autograd.grad(value(leaf), leaf)[0].norm()))
    assert sizes[0] > 1
    assert sizes[1] < 1e-7


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    gradient = checks.exact_gradients(partial(loss, config=Config()), logits(rows=3), logits(rows=3, seed=1))
    # Only what changes probabilities is taught.
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_half_precision_is_lifted() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    checks.lifted(partial(loss, config=Config()), partial(naive, centred=True), student, teacher, error=1e-5)


def test_the_term_reads_the_logits_of_both() -> None:
    shape = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)
    student, teacher = (Signals(logits(seed=seed), torch.ones(6, 3, dtype=torch.bool)) for seed in (0, 1))
    setting = LossSetting(Config(centred=False), shape, shape)
    step = Step(torch.zeros(6, dtype=torch.long), 0.5)
    want = loss(student.logits, teacher.logits, Config(centred=False))
    assert torch.equal(term(student, teacher, setting, step), want)


@pytest.mark.parametrize(("task", "classes"), [("multi-label", 3), ("regression", 1)])
def test_where_every_logit_speaks_for_itself_none_is_centred(task: str, classes: int) -> None:
    shape = Shape(layers=2, hidden=4, heads=2, classes=classes, pooled=4)
    mask, step = torch.ones(6, 3, dtype=torch.bool), Step(torch.zeros(6), 0.5, tasks.get(task))
    student, teacher = (Signals(logits(classes=classes, seed=seed), mask) for seed in (0, 1))
    found = term(student, teacher, LossSetting(Config(), shape, shape), step)
    want = naive(student.logits.numpy(), teacher.logits.numpy(), centred=False)
    assert float(found) == pytest.approx(want, rel=1e-12)  # sums in float64
