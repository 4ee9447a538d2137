"""Tensors in a file instead of memory: the system takes their pages back when it needs the space."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import tempfile
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdcli.models.integers import Integers

_LARGE = 64 << 20  # bytes; less is not worth a file
_ALIGNED = 64


def empty(wanted: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes and types in one temporary file, all zeros.

    The file has no name any more when this returns, so it goes with the last tensor. ``TMPDIR`` says where it is.
    """
    starts, total = [], 0
    for shape, dtype in wanted:
        starts.append(total)
        size = math.prod(shape) * dtype.itemsize
        total += -(-size // _ALIGNED) * _ALIGNED
    with tempfile.NamedTemporaryFile(prefix="kdcli-") as stream:
        stream.truncate(total)
        storage = torch.UntypedStorage.from_file(stream.name, shared=True, nbytes=total)
    made = []
    for (shape, dtype), start in zip(wanted, starts, strict=True):
        strides = torch.empty(shape, device="meta").stride()
        placed = torch.empty(0, dtype=dtype)
        made.append(placed.set_(storage, start // dtype.itemsize, shape, strides))  # type: ignore[arg-type]
    return made


def parameters(model: nn.Module) -> None:
    """Move the parameters of a large model into a file; they have to be filled afterwards."""
    own = list(model.parameters())
    if sum(p.numel() * p.element_size() for p in own) < _LARGE:
        return
    for parameter, place in zip(own, empty([(p.shape, p.dtype) for p in own]), strict=True):
        parameter.data = place
    _give_back()


def _give_back() -> None:
    """Ask the C library to return what was freed: it keeps blocks of some megabytes for itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def integers(given: Mapping[str, Integers]) -> dict[str, Integers]:
    """The same integers, in a file when they are many."""
    if sum(m.values.numel() for m in given.values()) < _LARGE:
        return dict(given)
    places = empty([(m.values.shape, m.values.dtype) for m in given.values()])
    made = {}
    for (name, matrix), place in zip(given.items(), places, strict=True):
        place.copy_(matrix.values)
        made[name] = Integers(place, matrix.scale, matrix.zero, matrix.bits)
    return made
