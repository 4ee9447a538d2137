"""The parameters of an optimizer in groups: what decays, at which rate, in which unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdcli.training import number_head


def of(model: nn.Module, weight_decay: float, deviation: float = 1.0) -> list[dict[str, Any]]:
    """Decay matrices and tables only: shrinking biases and norms towards zero has no meaning.

    A model that trains several others has ``rated``, which gives each of them its share of the learning rate.

    Args:
        model: Its trained parameters are grouped.
        weight_decay: Of AdamW.
        deviation: Of labels that are numbers, whose unit the last layer of every model has:
            :mod:`kdcli.training.number_head`.
    """
    groups: list[dict[str, Any]] = []
    named: Any = getattr(model, "rated", None)
    for part, scale in [(model, 1.0)] if named is None else named():
        trained = [p for p in part.parameters() if p.requires_grad]
        last = {id(p) for p in number_head.parameters(part)} if deviation != 1 else set()
        for unit, some in (
            (1.0, [p for p in trained if id(p) not in last]),
            (deviation, [p for p in trained if id(p) in last]),
        ):
            for params, decay in (
                ([p for p in some if p.ndim > 1], weight_decay / unit),
                ([p for p in some if p.ndim <= 1], 0.0),
            ):
                if params:
                    group = {"params": params, "weight_decay": decay, "scale": scale * unit, "unit": unit}
                    groups.append(group)
    return groups


def without_unit(optimizer: torch.optim.Optimizer) -> None:
    """Make the gradients of a layer that has a unit those of the layer without it, in place."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["unit"] != 1 else ():
            if p.grad is not None:
                p.grad.mul_(group["unit"])
