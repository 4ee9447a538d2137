"""The PKT loss: a naive reference, whose neighbours count, and batches without neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.training.losses import pkt
from kdcli.training.losses.pkt import Config, loss
from kdcli.training.losses.similarity import unit_rows
from kdcli.training.terms import LossSetting, Shape
from tests.training.losses import checks
from tests.training.losses.checks import features

SHAPE = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)


def naive(student: np.ndarray, teacher: np.ndarray) -> float:
    size, total = len(student), 0.0
    for i in range(size):
        shares = []
        for rows in (student.astype(float), teacher.astype(float)):
            others = [rows[j] for j in range(size) if j != i]
            cosines = [float(rows[i] @ x / np.linalg.norm(rows[i]) / np.linalg.norm(x)) for x in others]
            kernel = [(1 + c) / 2 for c in cosines]
            shares.append([k / sum(kernel) for k in kernel])
        total += sum(p * math.log(p / q) for q, p in zip(*shares, strict=True))
    return total / size


def on_a_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("rows", [3, 7, 32])
# Rounding, times the cancellation of small divergences.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_against_the_naive_reference(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = features(0, rows, dtype=dtype), features(1, rows, 6, dtype)
    found = loss(student, teacher)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy()), rel=tolerance)


def test_lengths_and_rotations_into_another_width_cost_nothing() -> None:
    teacher = features(1)
    student = teacher @ torch.linalg.qr(features(9, 10, 4))[0].T
    student = student * torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    assert float(loss(student, teacher)) == pytest.approx(0, abs=1e-12)


def test_only_the_proportions_of_the_neighbours_count() -> None:
    # All pairs at 60 degrees, or all at right angles: other similarities, the same probabilities.
    apart = torch.eye(3, dtype=torch.float64)
    close = apart + (1 - apart) * 0.5 / 1.5
    units = unit_rows(close)
    assert float((units @ units.T)[0, 1]) > 0.3
    assert float(loss(close, apart)) == pytest.approx(0, abs=1e-12)


def test_tearing_a_close_pair_apart_costs_more_than_joining_a_distant_one() -> None:
    # Two rows 10 or 170 degrees apart, and a third at right angles to both.
    up = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    close, distant = (torch.cat([F.pad(on_a_circle(0, degrees), (0, 1)), up]) for degrees in (10, 170))
    assert float(loss(distant, close)) > 2 * float(loss(close, distant)) > 0


def test_a_narrow_student_learns_the_teachers_nearest_neighbours() -> None:
    teacher = on_a_circle(*range(0, 360, 30)) @ torch.linalg.qr(features(9, 16, 2))[0].T
    student = features(3, 12, 3).requires_grad_()

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        units = unit_rows(rows.detach())
        return (units @ units.T).fill_diagonal_(-2).topk(2, dim=1).indices.sort(dim=1).values

    before = float((neighbours(student) == neighbours(teacher)).double().mean())
    optimiser = torch.optim.Adam([student], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (pkt.METHOD.weight * loss(student, teacher)).backward()
        optimiser.step()
    assert before < 0.5
    assert torch.equal(neighbours(student), neighbours(teacher))


@pytest.mark.parametrize("rows", [1, 2])
def test_without_a_choice_of_neighbours_loss_and_gradient_are_exactly_zero(rows: int) -> None:
    student = features(0, rows).requires_grad_()
    value = loss(student, features(1, rows))
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "rows",
    [
        features(0, 1).repeat(3, 1),
        torch.zeros(3, 2).double(),
        on_a_circle(0, 180, 180),
        on_a_circle(0, 180, 0),
        features(0, 3).tril(-1),
    ],
    ids=["identical", "zero", "opposite", "opposite and identical", "one of them zero"],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_degenerate_batches_have_finite_gradients(rows: torch.Tensor, side: str) -> None:
    student, teacher = (rows, features(1, 3)) if side == "student" else (features(1, 3), rows)
    checks.finite(loss, student, teacher, most=10)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(loss, features(0), features(1))


@pytest.mark.parametrize("on", ["pooled", "logits"])
def test_the_term_reads_what_was_chosen_and_asks_for_it(on: str) -> None:
    pooled, logits = [features(0), features(1)], [features(2, width=5), features(3, width=5)]
    setting = LossSetting(Config(on=on), SHAPE, SHAPE)
    checks.reads_what_was_chosen(pkt, setting, loss, pooled, logits)


def test_half_precision_is_lifted() -> None:
    checks.lifted(loss, naive, features(0), features(1), error=2e-4)
