"""Movement pruning's training: scores learn which weights go while the dense input model teaches the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdcli.context import Context
from kdcli.stages.prune.criteria.movement import first_scores, kept, masked, pattern_at
from kdcli.stages.prune.criterion import WeightJob
from kdcli.stages.prune.plan import PrunePlan
from kdcli.training.recovery import BATCH_SIZE, default_rate, recover


class _Masked(nn.Module):
    """Stands between a weight and the layer that uses it.

    The mask is a buffer, so that it is part of the model's state and of every resume point. The scores are not:
    they have a learning rate of their own and are trained along as part of :class:`_Scores`.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", weight.detach() != 0)
        self._scores = [scores]  # in a list, so that they are not this module's

    def forward(self, weight: Tensor) -> Tensor:
        return masked(weight, self._scores[0], self.mask)


class _Scores(nn.Module):
    """The scores of all matrices, their schedule, and the count of steps."""

    step: Tensor

    def __init__(self, job: WeightJob, plan: PrunePlan, steps: int, rate: float) -> None:
        super().__init__()
        self.plan, self.steps, self.rate, self.pattern = plan, steps, rate, job.pattern
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        weights = [layer.weight for layer in job.matrices.values()]
        # Flat, so that no weight decay pulls them to zero.
        self.scores = nn.ParameterList([first_scores(w, plan.config) for w in weights])
        self.start = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        self._layers = dict(job.matrices)
        self.masks = {
            name: _Masked(layer.weight, scores)
            for (name, layer), scores in zip(job.matrices.items(), self.scores, strict=True)
        }

    def rated(self) -> list[tuple[nn.Module, float]]:
        """Parts that are trained, with their learning rate as a multiple of the model's."""
        return [(self, self.plan.config.score_lr / self.rate)]

    def after_step(self) -> None:
        """Find the masks again when it is time; at the end of the training it always is."""
        self.step += 1
        at = int(self.step)
        if at % self.plan.config.every and at != self.steps:
            return
        weights = {name: _original(layer) for name, layer in self._layers.items()}
        # Zeros of an earlier stage keep a mask of zero: neither their weight nor their score gets a gradient.
        scores = dict(zip(weights, self.scores, strict=True))
        pattern = pattern_at(at / self.steps, self.pattern, self.start, self.plan.config)
        found = kept(weights, scores, pattern, self.plan.config)
        for name, mask in found.items():
            self.masks[name].mask.copy_(mask & (weights[name] != 0))


def weights(context: Context, plan: PrunePlan, job: WeightJob) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the model of ``job`` for the epochs of ``plan`` while its scores decide which weights become zero.

    Returns:
        True where a weight stays, and what to report of the training.
    """
    size = plan.training["batch_size"] or BATCH_SIZE
    steps = int(plan.training["epochs"]) * -(-len(context.encoded["train"]) // size)
    rate = plan.training["lr"] or default_rate(int(context.checkpoint.config.hidden_size))
    scores = _Scores(job, plan, steps, rate)
    for name, layer in job.matrices.items():
        parametrize.register_parametrization(layer, "weight", scores.masks[name])
    try:
        # Of several epochs the first ones have too few zeros.
        recovery = recover(context, **plan.training, after_step=scores.after_step, extra=scores, keep="last")
    finally:
        for layer in job.matrices.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return {name: masked.mask for name, masked in scores.masks.items()}, recovery


def _original(layer: nn.Linear) -> Tensor:
    """The weight under its parametrisation."""
    parametrized: Any = layer.parametrizations
    weight: Tensor = parametrized.weight.original
    return weight.detach()
