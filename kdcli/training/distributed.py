"""Several processes that train one model on shares of the same batches; the messages go through accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import processes

_inside = False  # a block of first_then_others


def start(device: torch.device) -> None:
    """Join the other processes, if there are any."""
    if processes.count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """The first process runs the block alone, the others when it is done (and find its result in the cache).

    A block inside another one waits for nobody: there the other processes wait already, and may have nothing to do
    inside when their turn comes.
    """
    global _inside
    if processes.count() == 1 or _inside:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        _inside = True
        try:
            yield
        finally:
            _inside = False


def share(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """This process's rows of a global batch (B,), and the factor that makes its mean a part of the global mean.

    A batch with fewer rows than processes gives some of them a row that counts zero, so that all of them
    take part in every step.
    """
    world, rank = processes.count(), processes.rank()
    if world == 1:
        return rows, 1.0
    own = rows[rank::world]
    return (own, len(own) * world / len(rows)) if len(own) else (rows[:1], 0.0)


def average(parameters: Sequence[nn.Parameter], flag: bool) -> bool:
    """Average all gradients over the processes, in place and in one message; missing ones count as zero.

    Args:
        parameters: In the same order in every process.
        flag: Travels along, so that a signal caught by one process stops all of them at the same step.

    Returns:
        Whether any process raised its flag.
    """
    if processes.count() == 1:
        return flag
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.reshape(-1) for g in grads), grads[0].new_tensor([float(flag)])])
    flat = total(flat) / processes.count()
    for p, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    return bool(flat[-1] > 0)


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    if processes.count() == 1:
        return values
    from accelerate.utils import reduce

    summed: Tensor = reduce(values.clone(), reduction="sum")
    return summed


def each(values: Tensor) -> list[Tensor]:
    """Every process's tensor, in their order."""
    if processes.count() == 1:
        return [values]
    from accelerate.utils import gather_object

    return list(gather_object([values]))


def of_first(value: Any) -> Any:
    """What the first process has for this, in all of them; it has to be known to that one alone."""
    if processes.count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
