"""Calibration rows, and what the layers of a model read of them: one batch at a time, nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.context import Context
from kdcli.families.modules import SmoothLinear
from kdcli.inputs import batching, kinds, sampling
from kdcli.inputs.feeding import model_inputs
from kdcli.probe.hooks import watching

T = TypeVar("T")


def calibration_batches(context: Context, rows: int, batch_size: int = 8) -> Iterator[dict[str, np.ndarray]]:
    """Collated training rows, drawn by the seed of the run, one batch at a time: nothing is kept.

    Rows of one batch have the same length, so that no padding is observed.
    """
    train, pad = context.encoded["train"], context.checkpoint.pad_id
    picked = sampling.sample(train, rows, context.seed, context.checkpoint.task)
    for part in batching.equal_length_batches(picked.lengths, batch_size):
        yield batching.collate(picked, part, pad)


@torch.no_grad()
def observe(
    context: Context,
    layers: Mapping[str, nn.Module],
    rows: int,
    make: Callable[[], T],
    add: Callable[[T, Tensor], None],
    *,
    outputs: bool = False,
    title: str = "calibration",
) -> dict[str, T]:
    """Collect something about the input of every layer; nothing of a batch is kept.

    Args:
        context: The model and its training rows.
        layers: Those to look at, by name; each takes one tensor. A smoothed one shows it after its factors.
        rows: How many rows to read.
        make: A new collector. Layers that read the very same tensor share one.
        add: Puts a batch's tensor into a collector. There is no padding in it.
        outputs: Look at what the layers give instead; nothing is shared then.
        title: For the progress display.

    Returns:
        Layer -> collector. Layers that never ran are missing.
    """
    model = context.checkpoint.model
    found: dict[str, T] = {}
    # Tensors are kept until the batch is over, so that no identity is used twice.
    added: dict[int, tuple[Tensor, T]] = {}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        values = output if outputs else given
        if id(values) not in added:
            module, collector = layers[name], found[name] if name in found else make()
            shown = values
            if isinstance(module, SmoothLinear) and not outputs:
                shown = values * module.smooth
            add(collector, shown)
            added[id(values)] = (values, collector)
        found[name] = added[id(values)][1]

    steps = min(rows, len(context.encoded["train"]))
    with watching(layers, see), context.progress.task(title, steps) as task:
        for batch in calibration_batches(context, rows):
            model(**model_inputs(model, batch, context.device))
            added.clear()
            task.advance(kinds.size(batch))
    return found
