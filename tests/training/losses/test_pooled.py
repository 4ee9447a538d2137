"""Pooled vector distillation against loops, and what its distances see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.training.losses import pooled
from kdcli.training.losses.pooled import Config, loss
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

DISTANCES = ["normalised", "cosine", "mse"]


def vectors(features: int, seed: int = 0, rows: int = 6) -> Tensor:
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(own: int, theirs: int, config: Config | None = None) -> LossSetting:
    """The student is no stack of layers, as a convolutional one."""
    made = LossSetting(config or Config(), Shape(0, own, 0, 2, own), Shape(4, theirs, 1, 2, theirs))
    torch.manual_seed(0)
    projection = pooled.trained(made)
    return LossSetting(made.config, made.student, made.teacher, (), projection and projection.double())


def term(own: Tensor, theirs: Tensor, made: LossSetting) -> Tensor:
    mask, step = torch.ones(len(own), 1, dtype=torch.bool), Step(torch.zeros(len(own), dtype=torch.long), 0.5)
    shown = [Signals(torch.zeros(len(own), 2), mask, pooled=x) for x in (own, theirs)]
    return pooled.term(shown[0], shown[1], made, step)


def naive(student: np.ndarray, teacher: np.ndarray, distance: str) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        length_s, length_t = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
        pairs = list(zip(s, t, strict=True))
        if distance == "mse":
            total += sum((a - b) ** 2 for a, b in pairs) / len(s)
        elif distance == "cosine":
            total += 1 - sum(a * b for a, b in pairs) / length_s / length_t
        else:
            total += sum((a / length_s - b / length_t) ** 2 for a, b in pairs)
    return total / len(student)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        # The rounding of the inputs is shared with the reference; the arithmetic is in float32.
        (torch.float16, torch.float32, 1e-5),
    ],
)
def test_against_the_naive_reference(
    distance: str, dtype: torch.dtype, result: torch.dtype, tolerance: float
) -> None:
    student, teacher = vectors(5, 0).to(dtype), vectors(5, 1).to(dtype)
    found = loss(student, teacher, Config(distance=distance))
    assert found.dtype == result
    want = naive(student.double().numpy(), teacher.double().numpy(), distance)
    assert float(found) == pytest.approx(want, rel=tolerance)


def test_the_normalised_distance_is_twice_the_cosine_distance() -> None:
    student, teacher = vectors(5, 0), vectors(5, 1)
    found = [float(loss(student, teacher, Config(distance=name))) for name in ("normalised", "cosine")]
    assert found[0] == pytest.approx(2 * found[1], rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_agreement_is_zero_and_only_mse_sees_the_length(distance: str) -> None:
    student = vectors(5)
    config = Config(distance=distance)
    assert float(loss(student, student, config)) == pytest.approx(0, abs=1e-12)
    longer = float(loss(3 * student, student, config))
    assert longer == pytest.approx(float(4 * (student**2).mean()) if distance == "mse" else 0, abs=1e-12)


def test_opposite_vectors_are_farthest() -> None:
    student = vectors(5)
    assert float(loss(-student, student, Config())) == pytest.approx(4, rel=1e-12)
    assert float(loss(-student, student, Config(distance="cosine"))) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_term_projects_a_student_of_any_kind(distance: str) -> None:
    made = setting(3, 5, Config(distance=distance))
    own, theirs = vectors(3, 0).requires_grad_(), vectors(5, 1).requires_grad_()
    assert isinstance(made.trained, nn.Linear)
    weight, bias = (p.detach().numpy() for p in made.trained.parameters())
    found = term(own, theirs, made)
    want = naive(own.detach().numpy() @ weight.T + bias, theirs.detach().numpy(), distance)
    assert float(found.detach()) == pytest.approx(want, rel=1e-12)
    found.backward()
    assert theirs.grad is None
    for tensor in (own, *made.trained.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad.abs().max()) > 0


def test_a_vector_of_zeros_gives_no_nan() -> None:
    for distance in DISTANCES:
        student = torch.zeros(2, 5, requires_grad=True)
        loss(student, torch.ones(2, 5), Config(distance=distance)).backward()
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())


def test_a_projection_lets_a_narrow_student_reach_a_teacher_that_is_a_linear_map_of_it() -> None:
    # With more rows than features unrelated vectors cannot be reached.
    own = vectors(3, 0, rows=40)
    reachable, unrelated = own @ vectors(5, 1, rows=3), vectors(5, 2, rows=40)
    lowest = []
    for theirs in (reachable, unrelated):
        made = setting(3, 5, Config(distance="mse"))
        assert isinstance(made.trained, nn.Linear)
        ones = torch.ones(40, 1, dtype=torch.float64)
        best = torch.linalg.lstsq(torch.cat([own, ones], 1), theirs).solution
        with torch.no_grad():
            made.trained.weight.copy_(best[:3].T)
            made.trained.bias.copy_(best[3])
        lowest.append(float(term(own, theirs, made).detach()))
    assert lowest[0] < 1e-20  # squared rounding of float64
    assert lowest[1] > 0.1


def test_what_it_reads() -> None:
    made = setting(5, 5)
    assert made.trained is None
    assert pooled.needs(made) == (Needs(pooled=True), Needs(pooled=True))
