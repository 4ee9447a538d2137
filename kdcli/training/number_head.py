"""A new head of a model that answers with a number starts where the labels are.

A blank head gives numbers about 0 that differ by about 1, and AdamW moves its bias by no more than the learning rate a
step: labels of 20,000 +- 1,000 are out of reach of any training. With mean m and standard deviation s of the labels the
blank head w, b becomes

    w' = s w,    b' = s b + m

so that the first answers have the place and the unit of the labels, and what is left to learn is the order.

Differs: scikit-learn's ``TransformedTargetRegressor`` changes the labels, and undoes that after each prediction; here
the model itself gives the scale of the labels from its first step on, so that nothing is left to undo in a graph.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from kdcli import families
from kdcli.models.checkpoint import Checkpoint


@torch.no_grad()
def start(checkpoint: Checkpoint, labels: np.ndarray) -> None:
    """Move a blank head to the labels, in place; nothing happens where the task gives them no unit.

    Args:
        checkpoint: Its head is new and of one linear layer or ends in one.
        labels: Of the training rows, some of which may have none.
    """
    task = checkpoint.task
    unit = task.unit(labels[task.known(labels)])
    if unit is None:
        return
    mean, deviation = unit
    layer = checkpoint.model.get_submodule(families.presumed(checkpoint.model_type).logits)
    last = [one for one in layer.modules() if isinstance(one, nn.Linear)][-1:]
    for linear in last:
        linear.weight.mul_(deviation)
        if linear.bias is not None:
            linear.bias.mul_(deviation).add_(mean)
