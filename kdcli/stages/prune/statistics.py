"""What the linear layers of an encoder see, gathered layer by layer while the earlier ones are pruned.

Shape letters: B rows, T tokens, N tokens of all rows, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from kdcli.families.layer import Layer
from kdcli.probe.hooks import Enough, reading
from kdcli.probe.layer_stream import Stream
from kdcli.stages.prune.criterion import WeightJob

InputStatistic = Literal["moment", "squares"]


class SecondMoment:
    """Mean of x x^T over tokens x (I,), as (I, I), or of its diagonal alone, as (I,).

    Products are taken in float32, which is fast, and added up in float64, so that the sum does not depend on
    how the rows were cut into batches beyond the rounding of one product.
    """

    def __init__(self, size: int, statistic: InputStatistic, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        shape = (size,) if statistic == "squares" else (size, size)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=place)
        self.count = 0

    def add(self, tokens: Tensor) -> None:
        """Take in tokens (N, I)."""
        x = tokens.detach().float()
        found = x.square().sum(0) if self.sum.ndim == 1 else x.T @ x
        self.sum += found.to(self.sum)
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """The statistic, float64; zeros before any token."""
        return self.sum / max(1, self.count)


Decide = Callable[[str, nn.Linear, Tensor], None]
"""(name, layer, statistic of its inputs): called once for every matrix, may change the layer's weight."""


@torch.no_grad()
def sequentially(job: WeightJob, statistic: InputStatistic, decide: Decide) -> None:
    """Show ``decide`` every matrix with the statistic of its inputs, in the order in which they run.

    Every matrix sees what reaches it from those before it as ``decide`` left them. Matrices that read the
    very same tensor (query, key and value) are decided together. Padding does not count.

    Args:
        job: With at least one batch; one hidden state (B, T, D) is held for each.
        statistic: What to gather.
        decide: See :data:`Decide`.
    """
    stream = Stream(job.model, job.layers[0].family, job.layers, job.batches)
    with job.progress.task("calibration", len(job.layers)) as task:
        for layer in job.layers:
            inside = set(layer.module.modules())
            matrices = {name: matrix for name, matrix in job.matrices.items() if matrix in inside}
            for group in _readers(stream, layer, matrices):
                reader = matrices[group[0]]
                found = SecondMoment(reader.in_features, statistic, reader.weight.device)
                _watch(stream, layer, reader, found)
                for name in group:
                    decide(name, matrices[name], found.mean)
            stream.advance(layer)
            task.advance()


def _watch(stream: Stream, layer: Layer, reader: nn.Linear, found: SecondMoment) -> None:
    """Add what ``reader`` is given of the real tokens of all batches; what comes after it does not run."""
    number = 0

    def see(name: str, given: Tensor) -> None:
        found.add(given[stream.masks[number]])
        raise Enough

    with reading({"reader": reader}, see):
        for number in range(len(stream)):
            with suppress(Enough):
                stream.call(layer, number)


def _readers(stream: Stream, layer: Layer, matrices: dict[str, nn.Linear]) -> list[Sequence[str]]:
    """The matrices of a layer in the order in which they run, those together that read one tensor."""
    ran: list[tuple[Tensor, str]] = []  # the tensors are kept, so that no identity is used twice
    with reading(matrices, lambda name, given: ran.append((given, name))):
        stream.call(layer, 0)
    return [[name for _, name in group] for _, group in groupby(ran, key=lambda pair: id(pair[0]))]
