"""Losses as the training loop wants them: functions of a model output and row indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.training.loop import Loss

SoftLoss = Callable[[Tensor, Tensor], Tensor]
"""(student logits (B, C), teacher logits (B, C)) -> scalar."""

UNLABELLED = -100  # the index that cross entropy ignores


def cross_entropy(labels: np.ndarray, device: torch.device) -> Loss:
    """Cross entropy with the labels (N,); rows labelled -100 do not count."""
    targets = torch.from_numpy(labels).to(device)

    def loss(output: Any, rows: np.ndarray) -> Tensor:
        return _hard(output.logits, targets[torch.from_numpy(rows).to(device)])

    return loss


def distillation(
    labels: np.ndarray, teacher: np.ndarray, soft: SoftLoss, alpha: float, device: torch.device
) -> Loss:
    """(1 - alpha) * cross entropy + alpha * soft; the soft term over all rows, the other over labelled ones.

    Args:
        labels: (N,) indices, -100 where a row has none.
        teacher: (N, C) logits; may be memory-mapped, only the batch's rows are read.
        soft: Already scaled by T^2 where its formula says so.
        alpha: In [0, 1].
        device: Of the model.
    """
    targets = torch.from_numpy(labels).to(device)

    def loss(output: Any, rows: np.ndarray) -> Tensor:
        logits = output.logits
        value = logits.new_zeros(())
        if alpha < 1:
            value = value + (1 - alpha) * _hard(logits, targets[torch.from_numpy(rows).to(device)])
        if alpha > 0:
            soft_targets = torch.from_numpy(np.ascontiguousarray(teacher[rows])).to(device)
            value = value + alpha * soft(logits, soft_targets)
        return value

    return loss


def _hard(logits: Tensor, targets: Tensor) -> Tensor:
    # Divided by the rows of the batch, not by its labelled rows: otherwise a batch with a single label
    # would weigh as much as a full one. A batch without any label gives zero and not NaN.
    total = F.cross_entropy(logits.float(), targets, ignore_index=UNLABELLED, reduction="sum")
    return total / len(targets)
