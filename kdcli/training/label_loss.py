"""Losses against the labels as the training loop wants them: functions of a model output and a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.tasks.task import Task
from kdcli.training import number_head
from kdcli.training.loop import Batch, BatchLoss


def label_loss(task: Task, labels: np.ndarray, device: torch.device) -> BatchLoss:
    """The task's loss against the labels of N rows; rows without one do not count."""
    targets, unit = torch.from_numpy(labels).to(device), number_head.deviation(task, labels)

    def loss(output: Any, batch: Batch) -> Tensor:
        return hard(task, output.logits, targets[torch.from_numpy(batch.rows).to(device)], unit)

    return loss


def mixed_label_loss(
    task: Task, first: np.ndarray, second: np.ndarray, share: np.ndarray, device: torch.device
) -> BatchLoss:
    """The task's loss of rows that belong to two labels, as far as ``share`` says.

    L = mean over the rows of share * loss(first) + (1 - share) * loss(second), as in CutMix (Yun et al. 2019,
    arXiv:1905.04899, eq. 1), where the share is that of the area.

    Args:
        task: What a label is.
        first: Labels of N rows.
        second: Labels of N rows; where ``share`` is 1 they do not count.
        share: (N,) in [0, 1].
        device: Where the logits will be.
    """
    unit = number_head.deviation(task, first)
    one, two = (
        number_head.without_unit(torch.from_numpy(labels).to(device), unit) for labels in (first, second)
    )
    weight = torch.from_numpy(share.astype(np.float32)).to(device)

    def loss(output: Any, batch: Batch) -> Tensor:
        at = torch.from_numpy(batch.rows).to(device)
        logits = number_head.without_unit(output.logits.float(), unit)
        own, other = (task.loss(logits, labels[at]) for labels in (one, two))
        return (weight[at] * own + (1 - weight[at]) * other).mean()

    return loss


def hard(task: Task, logits: Tensor, targets: Tensor, deviation: float = 1.0) -> Tensor:
    """The task's loss of logits (B, C) against the labels of the rows, of which some may have none.

    Divided by the rows of the batch, not by its labelled rows: otherwise a batch with a single label would
    weigh as much as a full one. A batch without any label gives zero and not NaN.

    ``deviation`` is that of numbers, which are compared without their unit: :mod:`kdcli.training.number_head`.
    """
    own, labels = (number_head.without_unit(one, deviation) for one in (logits.float(), targets))
    return task.loss(own, labels, "sum") / len(targets)
