"""Margin-MSE: a naive loop over pairs, what it does not see, and students whose level is not the teacher's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kdcli import registry, tasks
from kdcli.errors import UsageError
from kdcli.training.losses import logit_mse
from kdcli.training.losses.margin_mse import METHOD, Config, loss
from tests.training.losses import checks


def naive(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(student)), 2))
    gaps = [student[i, 0] - student[j, 0] - (teacher[i, 0] - teacher[j, 0]) for i, j in pairs]
    return float(np.mean(np.square(gaps)) / 2)


@pytest.mark.parametrize("rows", [2, 3, 17])
# Relative rounding of float64 and float32, times the few additions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_every_pair(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = (checks.logits(seed, rows, 1, dtype) for seed in (0, 1))
    found = loss(student, teacher)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(naive(student.numpy(), teacher.numpy()), rel=tolerance)


def test_a_level_of_the_teachers_own_costs_nothing_here_and_much_elsewhere() -> None:
    student, teacher = checks.logits(0, 8, 1), checks.logits(0, 8, 1) + 1000
    assert float(loss(student, teacher)) == pytest.approx(0, abs=1e-20)
    assert float(logit_mse.loss(student, teacher, logit_mse.Config(centred=False))) == pytest.approx(1e6)


def test_gradients_are_exact_and_sum_to_zero() -> None:
    gradient = checks.exact_gradients(loss, checks.logits(0, 5, 1), checks.logits(1, 5, 1))
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) > 0.1


def test_a_single_row_has_no_pair() -> None:
    assert float(loss(checks.logits(0, 1, 1), checks.logits(1, 1, 1))) == 0


def test_half_precision_is_lifted() -> None:
    # float32 on 6 rows, against float64
    checks.lifted(loss, naive, checks.logits(0, 6, 1), checks.logits(1, 6, 1), 1e-5)


def test_only_numbers_have_margins() -> None:
    assert Config() == METHOD.config()
    with pytest.raises(UsageError, match="differences of scores"):
        registry.need_answers({"margin-mse": METHOD}, tasks.get("text-classification"))
    registry.need_answers({"margin-mse": METHOD}, tasks.get("regression"))
