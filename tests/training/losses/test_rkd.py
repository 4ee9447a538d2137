"""The RKD loss: a naive reference, what it does not see, and batches without pairs or triplets."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.training.losses import rkd
from kdcli.training.losses.rkd import Config, loss
from kdcli.training.terms import LossSetting, Shape
from tests.training.losses import checks
from tests.training.losses.checks import features

SHAPE = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)
DISTANCE = Config(distance_weight=1.0, angle_weight=0.0)
ANGLE = Config(distance_weight=0.0, angle_weight=1.0)


def huber(gap: float) -> float:
    return 0.5 * gap**2 if abs(gap) <= 1 else abs(gap) - 0.5


def naive(student: np.ndarray, teacher: np.ndarray, config: Config) -> float:
    """Pair by pair and triplet by triplet."""
    both = [rows.astype(float) for rows in (student, teacher)]
    pairs = list(itertools.permutations(range(len(student)), 2))
    distances = [{(i, j): np.linalg.norm(x[i] - x[j]) for i, j in pairs} for x in both]
    means = [np.mean([d for d in found.values() if d > 0]) for found in distances]
    distance = np.mean([huber(distances[0][p] / means[0] - distances[1][p] / means[1]) for p in pairs])

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / norms) if norms > 0 else 0.0

    triplets = itertools.permutations(range(min(len(student), config.angle_rows)), 3)
    angle = np.mean([huber(cosine(both[0], *t) - cosine(both[1], *t)) for t in triplets])
    return float(config.distance_weight * distance + config.angle_weight * angle)


@pytest.mark.parametrize("config", [DISTANCE, ANGLE, Config(), Config(angle_rows=4)])
# Relative rounding of float64 and float32, times some additions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_against_the_naive_reference(config: Config, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = features(0, dtype=dtype), features(1, width=6, dtype=dtype)
    # Some gaps above the threshold of the Huber loss.
    student[0] *= 20
    found = loss(student, teacher, config)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy(), config), rel=tolerance)


@pytest.mark.parametrize("config", [DISTANCE, ANGLE])
def test_a_moved_scaled_and_rotated_copy_in_another_width_costs_nothing(config: Config) -> None:
    teacher = features(1)
    student = 3 * teacher @ torch.linalg.qr(features(9, 10, 4))[0].T + 5
    assert student.shape == (7, 10)
    assert float(loss(student, teacher, config)) == pytest.approx(0, abs=1e-20)
    # In the same width, comparing the features themselves would punish the same copy.
    turned = 3 * teacher @ torch.linalg.qr(features(9, 4, 4))[0].T + 5
    assert float(loss(turned, teacher, config)) == pytest.approx(0, abs=1e-20)
    assert float(F.mse_loss(turned, teacher)) > 1


def test_distances_bend_and_angles_notice() -> None:
    # Points on a line and the same points folded: close neighbours keep their distance, the angle is lost.
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    fold = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    # At the middle point the cosine goes from -1 to 0, at both others from 1 to sqrt(1/2).
    want = (2 * 0.5 + 4 * 0.5 * (1 - 0.5**0.5) ** 2) / 6
    assert float(loss(fold, line, ANGLE)) == pytest.approx(want, rel=1e-12)
    # Distances 1, 1, 2 of mean 4/3 against 1, 1, sqrt(2).
    mean = (2 + 2**0.5) / 3
    gaps = [1 / mean - 3 / 4, 1 / mean - 3 / 4, 2**0.5 / mean - 3 / 2]
    assert float(loss(fold, line, DISTANCE)) == pytest.approx(sum(0.5 * g**2 for g in gaps) / 3, rel=1e-12)


@pytest.mark.parametrize("config", [DISTANCE, ANGLE])
def test_a_repeated_row_changes_neither_the_unit_of_distance_nor_the_triplets(config: Config) -> None:
    teacher, student = features(1), features(0)
    student[1] = student[0]
    want = naive(student.numpy(), teacher.numpy(), config)
    assert float(loss(student, teacher, config)) == pytest.approx(want, rel=1e-10)


def test_only_the_first_rows_have_angles() -> None:
    student, teacher, config = features(0), features(1), ANGLE.model_copy(update={"angle_rows": 5})
    assert torch.equal(loss(student, teacher, config), loss(student[:5], teacher[:5], ANGLE))


@pytest.mark.parametrize(
    ("rows", "config"), [(1, Config()), (2, ANGLE)], ids=["one row", "two rows have no angle"]
)
def test_without_pairs_or_triplets_loss_and_gradient_are_exactly_zero(rows: int, config: Config) -> None:
    student = features(0, rows).requires_grad_()
    value = loss(student, features(1, rows), config)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "rows", [features(0, 1).repeat(4, 1), torch.zeros(4, 4).double(), features(0, 2).repeat(2, 1)]
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_coinciding_rows_have_finite_gradients(rows: torch.Tensor, side: str) -> None:
    student, teacher = (rows, features(1, 4)) if side == "student" else (features(1, 4), rows)
    # The weights are 25 and 50.
    checks.finite(partial(loss, config=Config()), student, teacher, most=1000)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(partial(loss, config=Config()), features(0), features(1))


@pytest.mark.parametrize("on", ["pooled", "logits"])
def test_the_term_reads_what_was_chosen_and_asks_for_it(on: str) -> None:
    pooled, logits = [features(0), features(1)], [features(2, width=5), features(3, width=5)]
    setting = LossSetting(Config(on=on, angle_rows=3), SHAPE, SHAPE)
    checks.reads_what_was_chosen(rkd, setting, partial(loss, config=setting.config), pooled, logits)


def test_half_precision_is_lifted() -> None:
    checks.lifted(
        partial(loss, config=Config()), partial(naive, config=Config()), features(0), features(1), error=1e-5
    )
