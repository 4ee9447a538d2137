"""A training that blew up is told as that: by its loss, its step and what to do, in the first epoch too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcli.errors import InputError
from kdcli.training.divergence import Divergence

LABELS = np.repeat([0, 1], [60, 40])


def judge(first: float | None, loss: float, validation: float, accuracy: float, labels: Any = LABELS) -> None:
    epoch = {"epoch": 2, "loss": loss, "validation_loss": validation, "validation_accuracy": accuracy}
    Divergence("training", 5.0, "--lr", labels).of_result(first, epoch)


@pytest.mark.parametrize(
    ("first", "loss", "validation", "accuracy"),
    [
        (0.6, 0.3, 0.4, 0.8),  # it learns
        (0.6, 0.61, 0.7, 0.6),  # it learns nothing
        (0.6, 0.01, 5.0, 0.55),  # it overfits noise
        (0.01, 0.5, 3.0, 0.85),  # a sure model that was pruned and trained back
        (0.6, 1.1, 1.4, 0.6),  # noise
        (None, 50.0, 50.0, 0.5),  # resumed from a point that did not keep it
    ],
)
def test_other_results_are_no_divergence(
    first: float | None, loss: float, validation: float, accuracy: float
) -> None:
    judge(first, loss, validation, accuracy)


def test_without_labels_to_compare_nothing_is_said() -> None:
    judge(0.6, 30.0, 20.0, 0.5, None)
    judge(0.6, 30.0, 20.0, 0.5, np.zeros(10, dtype=np.int64))
    judge(0.6, 30.0, 20.0, 0.5, np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize(("loss", "validation"), [(30.0, 10.0), (10.0, 0.8), (1.5, 1.5)])
def test_a_result_worse_than_none_is(loss: float, validation: float) -> None:
    with pytest.raises(InputError, match=r"training diverged: the loss was 0.6 at the first step") as found:
        judge(0.6, loss, validation, 0.62)
    said = f"on validation it is {validation:.4g} (one answer for all rows: 0.6931) at accuracy 0.62 (one answer for"
    assert said in str(found.value)
    assert found.value.hint == "the peak learning rate was 5; give a lower one with --lr, or check the data"


def test_a_short_training_is_judged_by_validation_before_and_after() -> None:
    """Of a single step the loss is known before it only."""
    epoch = {"epoch": 1, "loss": 0.6, "validation_loss": 5.0, "validation_accuracy": 0.6}
    one = Divergence("training", 5.0, "--lr", LABELS)
    one.of_result(0.6, epoch)
    one.of_result(0.6, epoch, 4.9)  # it came so
    with pytest.raises(InputError, match="on validation it is 5"):
        one.of_result(0.6, epoch, 0.7)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_names_its_step(loss: float) -> None:
    one = Divergence("training", 5.0, "--lr", LABELS)
    one.of_step(0.5, 1, 1)
    with pytest.raises(InputError, match=rf"training diverged: the loss became {loss} in epoch 2, step 7"):
        one.of_step(loss, 2, 7)
    with pytest.raises(InputError, match="the validation loss became"):
        one.of_step(loss, 2, what="validation loss")
