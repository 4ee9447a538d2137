"""A model that answers with a number is trained as if the labels had a standard deviation of 1.

Whoever gives prices in cents instead of euros gets the same model. With mean m and standard deviation s of the labels:

1. The losses compare z / s with y / s and with the teacher's z / s, as the likelihood of a Gaussian whose standard
   deviation is s does. They have no unit: alpha, beta and gamma weigh what they weigh for classes, and gradients are
   clipped at the same length.
2. The last layer w, b is the only one that has the unit. It takes the steps that w / s, b / s would: its gradient is
   taken s times, its rate is s times the others', and its decay is theirs over s.
3. A new last layer starts where the labels are.

A blank head gives numbers about 0 that differ by about 1, and AdamW moves its bias by no more than the learning rate a
step: labels of 20,000 +- 1,000 are out of reach of any training. With mean m and standard deviation s of the labels the
blank head w, b becomes

    w' = s w,    b' = s b + m

so that the first answers have the place and the unit of the labels, and what is left to learn is the order.

Differs: scikit-learn's ``TransformedTargetRegressor`` changes the labels, and undoes that after each prediction; here
the model itself gives the scale of the labels from its first step on, so that nothing is left to undo in a graph.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import families
from kdcli.models.checkpoint import Checkpoint
from kdcli.tasks.task import Task

_Values = TypeVar("_Values", Tensor, np.ndarray)


def deviation(task: Task, labels: np.ndarray | None) -> float:
    """The standard deviation s of the labels that are known; 1 where the task gives them no unit."""
    unit = None if labels is None else task.unit(labels[task.known(labels)])
    return 1.0 if unit is None else unit[1]


def without_unit(values: _Values, deviation: float) -> _Values:
    """Numbers, any shape, over their standard deviation; where that is 1 the same object, whatever it holds."""
    return values if deviation == 1 else values / deviation


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the layer that has the unit of the labels."""
    return [parameter for layer in _last(model) for parameter in layer.parameters()]


@torch.no_grad()
def start(checkpoint: Checkpoint, labels: np.ndarray) -> None:
    """Move a blank head to the labels, in place: to their unit, and to what is answered best without reading a text.

    Args:
        checkpoint: Its head is new and of one linear layer or ends in one.
        labels: Of the training rows, some of which may have none.
    """
    task = checkpoint.task
    known = labels[task.known(labels)]
    first, unit = task.first_logits(known), task.unit(known)
    if first is None:
        return
    deviation = 1.0 if unit is None else unit[1]
    for linear in _last(checkpoint.model):
        linear.weight.mul_(deviation)
        if linear.bias is not None:
            linear.bias.mul_(deviation).add_(torch.from_numpy(first).to(linear.bias))


def _last(model: nn.Module) -> list[nn.Linear]:
    """The last linear layer of a transformers classifier.

    Where the head has another name, as that of BART and T5 has, it is the last one with as many outputs as labels.
    """
    config: Any = model.config
    path = families.presumed(config.model_type).logits
    head = dict(model.named_modules()).get(path, nn.Identity())
    linear = [one for one in head.modules() if isinstance(one, nn.Linear)]
    every = (one for one in model.modules() if isinstance(one, nn.Linear))
    return (linear or [one for one in every if one.out_features == config.num_labels])[-1:]
