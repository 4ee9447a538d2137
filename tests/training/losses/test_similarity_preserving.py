"""The SP loss: a naive reference, what row norms take away, and batches without similarities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.training.losses import similarity, similarity_preserving
from kdcli.training.losses.similarity_preserving import Config, loss
from kdcli.training.terms import LossSetting, Shape
from tests.training.losses import checks
from tests.training.losses.checks import features

SHAPE = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)


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
        (similarity_preserving.METHOD.weight * loss(student, teacher)).backward()
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
    checks.finite(loss, rows, features(1, len(rows), 6), most=10)


def test_a_single_row_gives_zero() -> None:
    assert float(loss(features(0, 1), features(1, 1))) == pytest.approx(0, abs=1e-20)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(loss, features(0), features(1))


@pytest.mark.parametrize("on", ["pooled", "logits"])
def test_the_term_reads_what_was_chosen_and_asks_for_it(on: str) -> None:
    pooled, logits = [features(0), features(1)], [features(2, width=5), features(3, width=5)]
    setting = LossSetting(Config(on=on), SHAPE, SHAPE)
    checks.reads_what_was_chosen(similarity_preserving, setting, loss, pooled, logits)


def test_half_precision_is_lifted() -> None:
    checks.lifted(loss, naive, features(0), features(1), error=1e-5)
