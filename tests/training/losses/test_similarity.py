"""The similarity loss: a naive reference, what each kernel does not see, and batches without similarities."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from kdcli.errors import UsageError
from kdcli.training.losses import similarity
from kdcli.training.losses.similarity import METHOD, Config, loss
from kdcli.training.terms import LossSetting, Shape
from tests.training.losses import checks
from tests.training.losses.checks import features

SHAPE = Shape(layers=2, hidden=4, heads=2, classes=5, pooled=4)


def rotation(width: int, into: int) -> torch.Tensor:
    """An isometry (width, into)."""
    return torch.linalg.qr(features(9, into, width))[0].T


def naive(student: np.ndarray, teacher: np.ndarray, kernel: str) -> float:
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            found = []
            for rows in (student.astype(float), teacher.astype(float)):
                value = float(np.dot(rows[i], rows[j]))
                if kernel == "cosine":
                    value /= float(np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
                found.append(value)
            total += (found[0] - found[1]) ** 2
    return total / len(student) ** 2


@pytest.mark.parametrize("kernel", ["cosine", "dot"])
# Relative rounding of float64 and float32, times some additions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_the_naive_reference(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = features(0, dtype=dtype), features(1, width=6, dtype=dtype)
    found = loss(student, teacher, Config(kernel=kernel))
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy(), kernel), rel=tolerance)


@pytest.mark.parametrize("kernel", ["cosine", "dot"])
def test_a_rotated_copy_in_a_wider_space_costs_nothing(kernel: str) -> None:
    teacher = features(1)
    student = teacher @ rotation(4, 10)
    assert student.shape == (7, 10)
    assert float(loss(student, teacher, Config(kernel=kernel))) == pytest.approx(0, abs=1e-20)


def test_the_cosine_does_not_see_lengths_and_the_inner_product_does() -> None:
    teacher = features(1)
    longer = teacher * torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    assert float(loss(longer, teacher, Config())) == pytest.approx(0, abs=1e-20)
    assert float(loss(longer, teacher, Config(kernel="dot"))) > 0.1


def test_a_narrow_student_learns_who_belongs_together() -> None:
    # Three groups in 16 dimensions, a student of 2: rows of one group become its most similar ones.
    groups = torch.arange(12) % 3
    teacher = 3 * features(1, 3, 16)[groups] + features(2, 12, 16)
    student = features(3, 12, 2).requires_grad_()

    def nearest_is_of_the_same_group() -> float:
        units = similarity.unit_rows(student.detach())
        cosines = (units @ units.T).fill_diagonal_(-2)
        return float((groups[cosines.argmax(dim=1)] == groups).double().mean())

    before = nearest_is_of_the_same_group()
    optimiser = torch.optim.Adam([student], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        loss(student, teacher, Config()).backward()
        optimiser.step()
    assert before < 0.8
    assert nearest_is_of_the_same_group() == 1


@pytest.mark.parametrize("kernel", ["cosine", "dot"])
@pytest.mark.parametrize(
    "rows",
    [features(0, 1), features(0, 1).repeat(3, 1), torch.zeros(3, 4).double(), features(0, 3).tril(-1)],
    ids=["one", "identical", "zero", "one of them zero"],
)
def test_degenerate_batches_have_finite_gradients(kernel: str, rows: torch.Tensor) -> None:
    checks.finite(partial(loss, config=Config(kernel=kernel)), rows, features(1, len(rows), 6), most=100)


def test_a_single_row_is_like_itself_in_both_models() -> None:
    assert float(loss(features(0, 1), features(1, 1), Config())) == pytest.approx(0, abs=1e-20)


def test_gradients_are_exact_and_none_reaches_the_teacher() -> None:
    checks.exact_gradients(partial(loss, config=Config()), features(0), features(1))


@pytest.mark.parametrize("on", ["pooled", "logits"])
def test_the_term_reads_what_was_chosen_and_asks_for_it(on: str) -> None:
    pooled, logits = [features(0), features(1, width=6)], [features(2, width=5), features(3, width=5)]
    setting = LossSetting(Config(on=on), SHAPE, replace(SHAPE, pooled=6))
    checks.reads_what_was_chosen(similarity, setting, partial(loss, config=setting.config), pooled, logits)


def test_half_precision_is_lifted() -> None:
    checks.lifted(
        partial(loss, config=Config()), partial(naive, kernel="cosine"), features(0), features(1), error=1e-5
    )


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("kernel", ["cosine", "dot"])
@pytest.mark.parametrize("on", ["logits", "pooled"])
def test_the_direction_of_a_single_logit_is_refused(on: str, kernel: str, classes: int) -> None:
    shape = replace(SHAPE, classes=classes)
    setting = LossSetting(Config(on=on, kernel=kernel), shape, shape)
    if (on, kernel, classes) != ("logits", "cosine", 1):
        assert METHOD.check(setting) is None
        return
    # It could only be 1 or -1, whatever the size of the logits.
    assert float(loss(torch.tensor([[0.1], [2.0]]), torch.tensor([[3.0], [4.0]]), Config())) == 0
    with pytest.raises(
        UsageError, match="'similarity' compares the directions of rows, and of a single logit"
    ):
        METHOD.check(setting)
