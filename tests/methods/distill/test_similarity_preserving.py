"""The SP loss: a naive reference, what row norms take away, and batches without similarities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.methods import signals
from kdcli.methods.distill import similarity, similarity_preserving
from kdcli.methods.distill.similarity_preserving import Config, loss, term
from kdcli.methods.signals import Needs, Setting, Shape, Signals, Step

SHAPE = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)


def features(seed: int, rows: int = 7, width: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def naive(student: np.ndarray, teacher: np.ndarray) -> float:
    size, total = len(student), 0.0
    for i in range(size):
        found = []
        for rows in (student.astype(float), teacher.astype(float)):
            row = [sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in range(size)]
            norm = sum(value**2 for value in row) ** 0.5
            found.append([value / norm for value in row])
        total += sum((a - b) ** 2 for a, b in zip(*found, strict=True))
    return total / size**2


# Relative rounding of float64 and float32, times some additions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [2, 7, 32])
def test_against_the_naive_reference(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = features(0, rows, dtype=dtype), features(1, rows, 6, dtype)
    found = loss(student, teacher)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy()), rel=tolerance)
    assert float(found) <= 4 / rows


def test_scale_and_rotation_into_another_width_cost_nothing() -> None:
    teacher = features(1)
    student = 5 * teacher @ torch.linalg.qr(features(9, 10, 4))[0].T
    assert student.shape == (7, 10)
    assert float(loss(student, teacher)) == pytest.approx(0, abs=1e-20)
    # Unnormalised inner products do see the scale.
    assert float(similarity.loss(student, teacher, similarity.Config(kernel="dot"))) > 1


def test_lengths_count_against_each_other_unlike_with_the_cosine() -> None:
    teacher = features(1)
    longer = teacher * torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    assert float(similarity.loss(longer, teacher, similarity.Config())) == pytest.approx(0, abs=1e-20)
    assert float(loss(longer, teacher)) > 1e-3


def test_descent_brings_the_teachers_pattern_without_its_features() -> None:
    # Two groups at right angles: the similarity of the groups vanishes, that within them does not.
    groups = torch.arange(8) % 2
    teacher = torch.eye(2, 16, dtype=torch.float64)[groups]
    student = features(3, 8, 3).requires_grad_()
    optimiser = torch.optim.Adam([student], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        (similarity_preserving.WEIGHT * loss(student, teacher)).backward()
        optimiser.step()
    units = similarity.unit_rows(student.detach())
    same = groups[:, None] == groups
    cosines = units @ units.T
    assert float(cosines[same].min()) > 0.95
    assert float(cosines[~same].abs().max()) < 0.1


@pytest.mark.parametrize(
    "rows",
    [features(0, 1), features(0, 1).repeat(3, 1), torch.zeros(3, 4).double(), features(0, 3).tril(-1)],
    ids=["one", "identical", "zero", "one of them zero"],
)
def test_degenerate_batches_have_finite_gradients(rows: torch.Tensor) -> None:
    student = rows.clone().requires_grad_()
    value = loss(student, features(1, len(rows), 6))
    (gradient,) = torch.autograd.grad(value, student)
    assert bool(torch.isfinite(value))
    # A division by a norm of 1e-12 would be finite as well, and useless.
    assert float(gradient.abs().max()) < 10


def test_a_single_row_gives_zero() -> None:
    assert float(loss(features(0, 1), features(1, 1))) == pytest.approx(0, abs=1e-20)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    teacher = features(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), features(0).requires_grad_())
    student = features(0).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("on", ["pooled", "logits"])
def test_the_term_reads_what_was_chosen_and_asks_for_it(on: str) -> None:
    setting = Setting(Config(on=on), SHAPE, SHAPE)
    asked = Needs(pooled=on == "pooled")
    assert signals.needs(similarity_preserving, setting) == (asked, asked)
    pooled = [features(0), features(1)] if on == "pooled" else [None, None]
    logits = [features(2, width=5), features(3, width=5)]
    mask = torch.ones(7, 3, dtype=torch.bool)
    student, teacher = (Signals(z, mask, p) for z, p in zip(logits, pooled, strict=True))
    want = loss(*(pooled if on == "pooled" else logits))  # type: ignore[arg-type]
    assert torch.equal(term(student, teacher, setting, Step(torch.zeros(7, dtype=torch.long), 0.5)), want)


def test_half_precision_is_lifted() -> None:
    student, teacher = (features(seed, dtype=torch.bfloat16) for seed in (0, 1))
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(naive(student.double().numpy(), teacher.double().numpy()), rel=1e-5)
