"""Rounded activations in torch, so that a quantised checkpoint answers as its integer graph does.

One row is rounded at a time, as it is when the runtime answers single requests: answers do not depend on how rows
are batched, as long as no row of a batch is padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.modules import SmoothLinear
from kdcli.models.transforms import Quantise

_ATTRIBUTE = "_kdcli_rounding"


def round_rows(x: Tensor) -> Tensor:
    """Round each row of (B, T, I) or (B, I) to 256 steps over its own range, zero among them.

    This is ONNX's DynamicQuantizeLinear on a batch of one.
    """
    dims = tuple(range(1, x.ndim))
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round_().clamp_(0, 255)
    return ((x / scale).round_() + zero).clamp_(0, 255).sub_(zero).mul_(scale)


def round_fixed(x: Tensor, scale: float, zero: int) -> Tensor:
    """Round to uint8 with a given scale and zero point, as QuantizeLinear does."""
    return ((x / scale).round_() + zero).clamp_(0, 255).sub_(zero).mul_(scale)


def rounding_of(
    fixed: tuple[float, int] | None, active: Callable[[], bool] = lambda: True
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Any, ...] | None]:
    """A forward pre-hook that rounds what a layer reads, with a fixed range or with that of each row."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        if not active():
            return None
        x = inputs[0]
        factors = module.smooth if isinstance(module, SmoothLinear) else None
        x = x if factors is None else x * factors
        x = round_rows(x) if fixed is None else round_fixed(x, *fixed)
        return (x if factors is None else x / factors, *inputs[1:])

    return hook


def attach(model: nn.Module, log: Quantise) -> None:
    """Let ``model`` round activations as ``log`` says, until :func:`detach`."""
    handles, on = [], [True]
    for name, module in model.named_modules():
        fixed = log.activations.get(name)
        dynamic = (
            log.rounds == "dynamic" and isinstance(module, nn.Linear) and f"{name}.weight" in log.tensors
        )
        if fixed is not None or dynamic:
            handles.append(module.register_forward_pre_hook(rounding_of(fixed, lambda: on[0])))
    setattr(model, _ATTRIBUTE, (handles, on))


def detach(model: nn.Module) -> None:
    """Activations stay in float from here on."""
    handles, _ = getattr(model, _ATTRIBUTE, ([], []))
    for handle in handles:
        handle.remove()
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Activations stay in float inside the block."""
    _, on = getattr(model, _ATTRIBUTE, ([], [False]))
    before = on[0]
    on[0] = False
    try:
        yield
    finally:
        on[0] = before
