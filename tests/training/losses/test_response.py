"""The response loss: the worked example, a naive reference, its gradient and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from kdcli.training.losses.response import Config, loss

# The worked example of docs: label 1, teacher and student probabilities, equal weights, T = 5.
LABEL = torch.tensor([1])
TEACHER = torch.tensor([[0.6, 0.4]], dtype=torch.float64)
STUDENT = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
ALPHA, T = 0.5, 5.0


def logits(rows: int = 6, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)


def naive(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T^2 KL(teacher || student) in float64, one class at a time."""
    total = 0.0
    for s_row, t_row in zip(student.astype(float), teacher.astype(float), strict=True):
        s = [math.exp(x / temperature) for x in s_row]
        t = [math.exp(x / temperature) for x in t_row]
        for a, b in zip(s, t, strict=True):
            p, q = b / sum(t), a / sum(s)
            total += p * (math.log(p) - math.log(q))
    return temperature**2 * total / len(student)


def worked_example() -> dict[str, float]:
    config = Config(temperature=T)
    hard = F.cross_entropy(STUDENT.log(), LABEL)
    # Logits whose softmax at T is exactly the given probabilities.
    given = loss(T * STUDENT.log(), T * TEACHER.log(), config)
    entropy = -(TEACHER * TEACHER.log()).sum()
    softened = loss(STUDENT.log(), TEACHER.log(), config)
    return {
        "divergence": float((1 - ALPHA) * hard + ALPHA * given),
        "cross entropy": float((1 - ALPHA) * hard + ALPHA * (given + T**2 * entropy)),
        "softened": float((1 - ALPHA) * hard + ALPHA * softened),
    }


@pytest.mark.parametrize(
    ("reading", "value"), [("divergence", 0.8843), ("cross entropy", 9.2969), ("softened", 0.6141)]
)
def test_the_worked_example(reading: str, value: float) -> None:
    assert worked_example()[reading] == pytest.approx(value, abs=5e-5)


def test_the_published_value_of_the_worked_example_is_no_reading_of_it() -> None:
    assert min(abs(value - 11.652) for value in worked_example().values()) > 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("classes", [2, 5, 151])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_against_the_naive_reference(
    temperature: float, classes: int, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = (logits(classes=classes, seed=seed, dtype=dtype) for seed in (0, 1))
    want = naive(student.numpy(), teacher.numpy(), temperature)
    assert float(loss(student, teacher, Config(temperature=temperature))) == pytest.approx(
        want, rel=tolerance
    )


def test_the_direction_is_teacher_to_student() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    swapped = naive(teacher.numpy(), student.numpy(), 2.0)
    assert abs(float(loss(student, teacher, Config())) - swapped) > 0.01


def test_a_copied_batch_has_the_same_loss() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1), Config())
    assert float(twice) == pytest.approx(float(loss(student, teacher, Config())), rel=1e-12)


def test_agreement_is_zero_whatever_constant_is_added_to_a_row() -> None:
    student = logits().requires_grad_()
    value = loss(student, student.detach() + torch.arange(6.0, dtype=torch.float64)[:, None], Config())
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_by_finite_differences(temperature: float) -> None:
    teacher = logits(rows=3, seed=1)
    config = Config(temperature=temperature)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, config), logits(rows=3).requires_grad_())


def test_gradient_is_the_difference_of_probabilities() -> None:
    # Eq. 2 of the paper times T^2, averaged over the rows.
    student, teacher, temperature = logits(seed=0).requires_grad_(), logits(seed=1), 3.0
    loss(student, teacher, Config(temperature=temperature)).backward()
    gap = (student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, temperature * gap / len(teacher), rtol=1e-10, atol=1e-12)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = logits(seed=0).requires_grad_(), logits(seed=1).requires_grad_()
    loss(student, teacher, Config()).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_high_temperature_is_half_the_mean_square_of_centred_logits() -> None:
    # KL of two softmaxes near the uniform one is Var(z_t - z_s) / (2 T^2), the variance over the C classes.
    student, teacher = logits(seed=0), logits(seed=1)
    gap = teacher - student
    want = 0.5 * float(((gap - gap.mean(1, keepdim=True)) ** 2).mean())
    far = [abs(float(loss(student, teacher, Config(temperature=t))) / want - 1) for t in (1e2, 1e3, 1e4)]
    assert far[2] < 1e-3
    # The error is of first order in 1 / T.
    assert far[0] / far[1] == pytest.approx(10, rel=0.2)
    assert far[1] / far[2] == pytest.approx(10, rel=0.2)


def test_the_gradients_size_hardly_depends_on_the_temperature() -> None:
    teacher = logits(seed=1)
    sizes = []
    for temperature in (4.0, 10.0, 40.0):
        student = logits(seed=0).requires_grad_()
        loss(student, teacher, Config(temperature=temperature)).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    # Without T^2 the last would be about a hundredth of the first.
    assert max(sizes) / min(sizes) < 1.5


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_precision_is_kept_and_half_precision_lifted(given: torch.dtype, result: torch.dtype) -> None:
    student, teacher = logits(seed=0, dtype=given), logits(seed=1, dtype=given)
    found = loss(student, teacher, Config())
    assert found.dtype == result
    # The rounding of the inputs is shared with the reference, so only the arithmetic is judged.
    want = naive(student.double().numpy(), teacher.double().numpy(), Config().temperature)
    assert float(found) == pytest.approx(want, rel=1e-5)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), Config(temperature=1.0))
    value.backward()
    assert float(value.detach()) == pytest.approx(2e4)
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValidationError):
        Config(temperature=temperature)
