"""Tensors in a file instead of memory: the system takes their pages back when it needs the space."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli import memory
from kdcli.models.integers import Integers

LARGE = 64 << 20
"""Bytes; less is not worth a file."""
_ALIGNED = 64


def empty(wanted: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes and types in one temporary file, all zeros.

    The file has no name any more when this returns, so it goes with the last tensor. ``TMPDIR`` says where it is.
    Where there is no room for it, and on systems where an open file keeps its name, they are in memory.
    """
    starts, total = [], 0
    for shape, dtype in wanted:
        starts.append(total)
        size = math.prod(shape) * dtype.itemsize
        total += -(-size // _ALIGNED) * _ALIGNED
    if (storage := _in_file(total)) is None:
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in wanted]
    made = []
    for (shape, dtype), start in zip(wanted, starts, strict=True):
        strides = torch.empty(shape, device="meta").stride()
        placed = torch.empty(0, dtype=dtype)
        made.append(placed.set_(storage, start // dtype.itemsize, shape, strides))
    return made


def _in_file(size: int) -> Any:
    """A storage in a file without a name; None where there can be none."""
    if os.name != "posix":
        return None
    try:
        with tempfile.NamedTemporaryFile(prefix="kdcli-") as stream:
            stream.truncate(size)
            if hasattr(os, "posix_fallocate"):
                # A disk that is full would end the process when a page is written, not when it is asked for.
                os.posix_fallocate(stream.fileno(), 0, size)
            return torch.UntypedStorage.from_file(stream.name, shared=True, nbytes=size)
    except (OSError, RuntimeError):
        return None


def parameters(model: nn.Module) -> None:
    """Move the parameters of a large model into a file; they have to be filled afterwards."""
    own = list(model.parameters())
    if sum(p.numel() * p.element_size() for p in own) < LARGE:
        return
    for parameter, place in zip(own, empty([(p.shape, p.dtype) for p in own]), strict=True):
        parameter.data = place
    memory.give_back()


def integers(given: Mapping[str, Integers]) -> dict[str, Integers]:
    """The same integers, in a file when they are many."""
    if sum(m.values.numel() for m in given.values()) < LARGE:
        return dict(given)
    places = empty([(m.values.shape, m.values.dtype) for m in given.values()])
    made = {}
    for (name, matrix), place in zip(given.items(), places, strict=True):
        place.copy_(matrix.values)
        made[name] = Integers(place, matrix.scale, matrix.zero, matrix.bits)
    return made
