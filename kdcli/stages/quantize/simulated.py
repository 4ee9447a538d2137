"""The answers that a quantised model will give, computed by torch: any layer in integers or in float at will.

Weights are exchanged in place, activations are rounded in front of a layer. One row is rounded at a time, as it is
when the runtime answers single requests, so the answers do not depend on how rows are batched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.inputs import batching
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import Encoded
from kdcli.models import activations
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.integers import Integers
from kdcli.stages.quantize.scheme import Rounds
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

_BATCH = 32


@dataclass
class Answers:
    """Logits (N, C) of some rows."""

    logits: np.ndarray
    labels: np.ndarray
    task: Task = CLASSIFICATION
    queries: np.ndarray | None = None  # (N,), as the task's score has them

    @property
    def score(self) -> float:
        """The task's, against the labels."""
        return self.task.selection_score(self.logits, self.labels, self.queries)

    def divergence(self, other: Answers) -> float:
        """Mean divergence of the other's answers from these; in nats where it is a KL."""
        before, after = (torch.from_numpy(one.logits.astype(np.float64)) for one in (self, other))
        return max(0.0, float(self.task.divergence(after, before).numpy().mean()))


class Simulation:
    """A model of which some layers are quantised.

    Args:
        checkpoint: In float; it is left so when the block ends.
        integers: Name of a weight -> its quantised form.
        dense: Name of a weight -> its float form.
        rounds: ``dynamic`` rounds the input of every quantised matrix, ``none`` rounds none; layers in
            ``ranges`` have a fixed range.
        ranges: Layer -> (scale, zero point).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        integers: Mapping[str, Integers],
        dense: Mapping[str, Tensor],
        *,
        rounds: Rounds,
        ranges: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        self.checkpoint, self.integers, self.dense = checkpoint, integers, dense
        self.rounds, self.ranges = rounds, ranges or {}
        self.active: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Simulation:
        model = self.checkpoint.model
        for name in self.integers:
            layer = name.removesuffix(".weight")
            module = model.get_submodule(layer)
            if layer in self.ranges or (self.rounds == "dynamic" and isinstance(module, nn.Linear)):
                active = partial(self._is_active, layer)
                hook = activations.rounding_of(self.ranges.get(layer), active)
                self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        self._set(set())
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def layers(self) -> list[str]:
        """The layers that can be quantised."""
        return [name.removesuffix(".weight") for name in self.integers]

    @torch.inference_mode()
    def answers(self, quantised: Collection[str], rows: Encoded) -> Answers:
        """What the model says to labelled rows when exactly these layers are quantised."""
        self._set(set(quantised))
        return answer(self.checkpoint, rows)

    def _is_active(self, layer: str) -> bool:
        return layer in self.active

    @torch.no_grad()
    def _set(self, wanted: set[str]) -> None:
        for layer in wanted ^ self.active:
            weight = self.checkpoint.model.get_parameter(f"{layer}.weight")
            if layer in wanted:
                weight.copy_(self.integers[f"{layer}.weight"].dense().view(weight.shape))
            else:
                weight.copy_(self.dense[f"{layer}.weight"])
        self.active = wanted


@torch.inference_mode()
def answer(checkpoint: Checkpoint, rows: Encoded) -> Answers:
    """Logits of a model for every row; batches have rows of one length, so there is no padding."""
    assert rows.labels is not None
    logits: np.ndarray | None = None
    for index in batching.equal_length_batches(rows.lengths, _BATCH):
        batch = batching.collate(rows, index, checkpoint.pad_id)
        output = checkpoint.model(**model_inputs(checkpoint.model, batch, checkpoint.device))
        part = output.logits.float().cpu().numpy()
        if logits is None:
            logits = np.empty((len(rows), part.shape[1]), dtype=np.float32)
        logits[index] = part
    assert logits is not None
    return Answers(logits, rows.labels, checkpoint.task, rows.queries)
