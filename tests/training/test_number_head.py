"""A blank head of numbers starts at the labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.models.checkpoint import Checkpoint
from kdcli.tasks.regression import Regression
from kdcli.tasks.task import Task
from kdcli.training import number_head
from tests import tiny


def blank(family: str, task: Task) -> tuple[Checkpoint, torch.Tensor]:
    made = tiny.checkpoint(family)
    made.task = task
    ids = torch.randint(5, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    return made, ids


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_first_answers_have_the_place_and_the_unit_of_the_labels(family: str) -> None:
    labels = np.array([19_000, np.nan, 21_000, 20_500], np.float32)
    mean, deviation = np.nanmean(labels.astype(np.float64)), np.nanstd(labels.astype(np.float64))
    made, ids = blank(family, Regression())
    with torch.no_grad():
        before = made.model(input_ids=ids).logits
        number_head.start(made, labels)
        after = made.model(input_ids=ids).logits
    # float32 of numbers of 2e4
    assert torch.allclose(after, before * deviation + mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Regression(activation="sigmoid"), [0.1, 0.9]),
        (Regression(), [3.0, 3.0]),
        (Regression(), [np.nan, np.nan]),
    ],
)
def test_a_head_without_a_unit_stays_as_it_is(task: Task, labels: list[float]) -> None:
    made, ids = blank("bert", task)
    with torch.no_grad():
        before = made.model(input_ids=ids).logits
        number_head.start(made, np.array(labels, np.float32))
        assert torch.equal(made.model(input_ids=ids).logits, before)
