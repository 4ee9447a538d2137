"""Training with rounded weights and activations: rounded on the way forward, straight through on the way back.

Within :func:`rounded`, the chosen layers compute with Q(w) and Q(x) while their parameters stay the float ones
that the optimizer moves:

    forward   y = Q(w) Q(x) + b        backward   dL/dw = dL/dQ(w),   dL/dx = dL/dQ(x) inside the range, 0 outside

Names, shapes and parameters of the model are those it had, so everything that trains, stores or reads it goes on
as before; the ranges of activations are buffers beside them.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3 (fake quantisation, averages of ranges); Bengio
et al. 2013, arXiv:1308.3432 (the straight-through estimator). Differs: padding does not count in the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.input_names import MASK
from kdcli.stages.quantize.ranges import LEVELS, Affine, affine

Rounding = Callable[[Tensor], Tensor]
"""A matrix (O, I) -> what its integers stand for, the same shape; no gradient is asked of it."""

_NAMES = ("range_low", "range_high")


class _Mask:
    """Which tokens of the running batch are real; layers that read something else do not use it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None  # (B, T) bool

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get(MASK)
        self.value = None if mask is None else mask.bool()


def straight_through(weight: Tensor, rounding: Rounding) -> Tensor:
    """Q(w) forward, the identity backward."""
    with torch.no_grad():
        change = rounding(weight) - weight
    return weight + change


class _RoundedLinear(nn.Linear):
    rounding: Rounding
    momentum: float | None
    mask: _Mask
    range_low: Tensor
    range_high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if isinstance(smooth := getattr(self, "smooth", None), Tensor):
            x = x * smooth
        if self.momentum is not None:
            x = self._rounded(x)
        return F.linear(x, straight_through(self.weight, self.rounding), self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x.detach())
        elif bool(
            self.range_low.isnan()
        ):  # judged before the first step: no range has been seen, so none is taken
            return x
        low, high = self.range_low.clamp(max=0), self.range_high.clamp(min=0)
        scale = ((high - low) / (LEVELS - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, LEVELS - 1)

    def _follow(self, x: Tensor) -> None:
        """Move the range a little towards that of the batch, padding left out."""
        assert self.momentum is not None
        low, high = x.amin(-1), x.amax(-1)
        real = self.mask.value
        if real is not None and low.shape == real.shape:
            low, high = low.masked_fill(~real, torch.inf), high.masked_fill(~real, -torch.inf)
        first = self.range_low.isnan()
        for mine, batch in ((self.range_low, low.amin()), (self.range_high, high.amax())):
            mine.copy_(torch.where(first, batch, torch.lerp(mine, batch, self.momentum)))


class _RoundedEmbedding(nn.Embedding):
    rounding: Rounding

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table; each is rounded by itself, so only those of the batch are."""
        rows = super().forward(ids)
        flat = straight_through(rows.reshape(-1, rows.shape[-1]), self.rounding)
        return flat.view(rows.shape)


@contextmanager
def rounded(
    model: nn.Module, layers: Mapping[str, Rounding], *, momentum: float | None = None
) -> Iterator[None]:
    """Let layers compute with rounded weights inside the block, and with rounded inputs if asked.

    Args:
        model: Changed in place; its layers are what they were after the block, trained weights included.
        layers: Name of a linear layer or an embedding table -> how its weight is rounded. A table's rounding
            must treat every row by itself.
        momentum: Share of a batch in the moving average of the range of what linear layers read; None leaves
            activations in float. Outside of training the ranges stay where they are.

    Yields:
        Nothing; :func:`ranges` reads the ranges inside the block.
    """
    mask = _Mask()
    handle = model.register_forward_pre_hook(mask.hook, with_kwargs=True)
    changed: list[tuple[Any, type]] = []
    try:
        for name, rounding in layers.items():
            layer: Any = model.get_submodule(name)
            kind = type(layer)
            if isinstance(layer, nn.Embedding):
                layer.__class__ = _RoundedEmbedding
            else:
                layer.__class__ = _RoundedLinear
                layer.momentum, layer.mask = momentum, mask
                if momentum is not None:
                    for buffer in _NAMES:
                        layer.register_buffer(buffer, torch.tensor(torch.nan, device=layer.weight.device))
            layer.rounding = rounding
            changed.append((layer, kind))
        yield
    finally:
        handle.remove()
        for layer, kind in changed:
            layer.__class__ = kind
            for name in ("rounding", "momentum", "mask"):
                layer.__dict__.pop(name, None)
            for name in _NAMES:
                layer._buffers.pop(name, None)


def ranges(model: nn.Module) -> dict[str, Affine]:
    """Layer -> how its input is rounded, for every layer that :func:`rounded` gave a range and that has run."""
    return {
        name: affine(float(layer.range_low), float(layer.range_high))
        for name, layer in model.named_modules()
        if isinstance(layer, _RoundedLinear) and layer.momentum is not None and not layer.range_low.isnan()
    }
