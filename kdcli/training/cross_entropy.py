"""Losses as the training loop wants them: functions of a model output and a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.training.loop import Batch, BatchLoss

UNLABELLED = -100  # the index that cross entropy ignores


def cross_entropy(labels: np.ndarray, device: torch.device) -> BatchLoss:
    """Cross entropy with the labels (N,); rows labelled -100 do not count."""
    targets = torch.from_numpy(labels).to(device)

    def loss(output: Any, batch: Batch) -> Tensor:
        return hard(output.logits, targets[torch.from_numpy(batch.rows).to(device)])

    return loss


def mixed_cross_entropy(
    first: np.ndarray, second: np.ndarray, share: np.ndarray, device: torch.device
) -> BatchLoss:
    """Cross entropy of rows that belong to two labels, as far as ``share`` says.

    L = mean over the rows of share * CE(first) + (1 - share) * CE(second), as in CutMix (Yun et al. 2019,
    arXiv:1905.04899, eq. 1), where the share is that of the area.

    Args:
        first: (N,) class indices.
        second: (N,) class indices; where ``share`` is 1 they do not count.
        share: (N,) in [0, 1].
        device: Where the logits will be.
    """
    one, two = (torch.from_numpy(labels).to(device) for labels in (first, second))
    weight = torch.from_numpy(share.astype(np.float32)).to(device)

    def loss(output: Any, batch: Batch) -> Tensor:
        at = torch.from_numpy(batch.rows).to(device)
        logits = output.logits.float()
        own, other = (F.cross_entropy(logits, labels[at], reduction="none") for labels in (one, two))
        return (weight[at] * own + (1 - weight[at]) * other).mean()

    return loss


def hard(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (B, C) with targets (B,), -100 where a row has none.

    Divided by the rows of the batch, not by its labelled rows: otherwise a batch with a single label would
    weigh as much as a full one. A batch without any label gives zero and not NaN.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=UNLABELLED, reduction="sum")
    return total / len(targets)
