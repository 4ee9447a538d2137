"""Convolutions as chains of smaller ones: Tucker-2, CP and tensor train, built, counted and multiplied back.

A kernel K (O, I/G, *k) of G groups is the product of the kernels of its chain, taken group by group:

    tucker2       1x1 (I -> G A), k (G A -> G B), 1x1 (G B -> O)                    ranks (A, B)
    cp            1x1 (I -> G R), one depthwise kernel an axis, 1x1 (G R -> O)      ranks (R,)
    tensor-train  1x1 (I -> G R1), one full kernel an axis, 1x1 (G Rn -> O)         ranks (R1, ..., Rn)

Only axes longer than one tap get a kernel, so tensor-train has as many ranks as those axes and one more. An axis
of one tap leaves its stride and padding to the first kernel of the chain that has several, and a 1x1 convolution
is two 1x1 convolutions of one rank. A factor that would be square (A = I/G, or B = O/G) is left out: multiplied
into its neighbour it costs nothing.

Every factor but the last is without bias, so zeros that stand for padding stay zeros on the way, and a pointwise
factor commutes with every other kind of padding as well: the chain is exact at the border too.

Shape letters: G groups, O and I output and input channels of the whole layer, k taps an axis, A, B, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import InputError

KINDS = ("tucker2", "cp", "tensor-train")
"""Names of the forms; those of the methods that find their weights."""

Conv = nn.Conv1d | nn.Conv2d


class FactorisedConv(nn.Sequential):
    """A convolution stored as a chain of smaller ones, run one after the other; see :func:`build`.

    It answers what code asks of a convolution: ``in_channels``, ``out_channels``, ``kernel_size``, ``stride``,
    ``padding``, ``dilation``, ``groups``, ``padding_mode`` and ``bias`` are those of the layer it replaces.
    """

    def __init__(self, layer: Conv, kind: str, ranks: Sequence[int]) -> None:
        pieces = _pieces(layer, kind, ranks)
        last = len(pieces) - 1
        bias, mode = layer.bias is not None, layer.padding_mode
        super().__init__(
            *(_module(layer, p, bias=bias and i == last, padding_mode=mode) for i, p in enumerate(pieces))
        )
        self.kind, self.ranks = kind, tuple(ranks)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode

    @property
    def bias(self) -> Tensor | None:
        """(O,), on the last factor."""
        last: Any = self[-1]
        return last.bias

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"kind={self.kind}, ranks={self.ranks}"


@dataclass(frozen=True)
class _Piece:
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a dense ``Conv1d`` or ``Conv2d``; a subclass may compute something else."""
    return type(module) in (nn.Conv1d, nn.Conv2d)


def why_not(layer: nn.Module) -> str | None:
    """Why the layer cannot be factorised; None when it can."""
    if not is_convolution(layer):
        return f"a {type(layer).__name__} is neither a Conv1d nor a Conv2d"
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    if 1 < layer.groups == layer.in_channels:
        return "it is depthwise: a kernel of one input channel has no factors smaller than itself"
    return None


def spatial_axes(layer: Conv | FactorisedConv) -> tuple[int, ...]:
    """Axes of the kernel with more than one tap, 0 for the first."""
    return tuple(axis for axis, taps in enumerate(layer.kernel_size) if taps > 1)


def channels(layer: Conv) -> tuple[int, int]:
    """Output and input channels of one group: (O/G, I/G)."""
    return layer.out_channels // layer.groups, layer.in_channels // layer.groups


def kernels(layer: Conv) -> Tensor:
    """The layer's kernel as one tensor a group, (G, O/G, I/G, *taps) float64 on the CPU, axes of one tap left out."""
    weight = layer.weight.detach().cpu().double()
    return weight.reshape(
        layer.groups, *channels(layer), *(layer.kernel_size[a] for a in spatial_axes(layer))
    )


def parameters(layer: Conv, kind: str, ranks: Sequence[int]) -> int:
    """Parameters of the factors, the bias included; raises as :func:`build` does."""
    bias = 0 if layer.bias is None else layer.out_channels
    return sum(piece.weights for piece in _pieces(layer, kind, ranks)) + bias


def build(layer: Conv, kind: str, ranks: Sequence[int]) -> FactorisedConv:
    """Make the uninitialised chain of one form that maps what ``layer`` maps, border included.

    Args:
        layer: A dense convolution with any stride, padding, dilation and number of groups.
        kind: One of :data:`KINDS`.
        ranks: Of each group; how many and of what is said at the top of this file.

    Returns:
        The chain, on the device, in the dtype and the mode of ``layer``.

    Raises:
        InputError: The layer is none that can be factorised, or the ranks do not fit it.
    """
    reason = why_not(layer)
    if reason is not None:
        raise InputError(f"the layer cannot be factorised: {reason}")
    made = FactorisedConv(layer, kind, ranks)
    made.to(device=layer.weight.device, dtype=layer.weight.dtype)
    return made.train(layer.training)


@torch.no_grad()
def fill(module: FactorisedConv, layer: Conv, factors: Sequence[Tensor]) -> FactorisedConv:
    """Give the chain its weights, and the bias of the layer.

    Args:
        module: As :func:`build` made it.
        layer: What it was made for.
        factors: First to last, each (G, outputs, inputs, *taps) for one group; a depthwise one has 1 input. Square
            ones at the ends, which the chain leaves out, are given too and multiplied into their neighbours.
    """
    parts = list(factors)
    if module.kind != "cp":
        if parts[0].shape[1] == parts[0].shape[2]:
            parts[:2] = [torch.einsum("gom...,gmi->goi...", parts[1], parts[0])]
        if len(parts) > 1 and parts[-1].shape[1] == parts[-1].shape[2]:
            parts[-2:] = [torch.einsum("gom,gmi...->goi...", parts[-1], parts[-2])]
    convolutions: list[Any] = list(module)
    for factor, part in zip(convolutions, parts, strict=True):
        factor.weight.copy_(part.reshape(factor.weight.shape))
    if module.bias is not None and layer.bias is not None:
        module.bias.copy_(layer.bias)
    return module


@torch.no_grad()
def kernel(module: FactorisedConv) -> Tensor:
    """Multiply the factors back into one kernel (O, I/G, *k), in float64 where the device has it."""
    groups = module.groups
    product: Tensor | None = None
    convolutions: list[Any] = list(module)
    for factor in convolutions:
        weight = factor.weight.detach()
        weight = weight if weight.device.type == "mps" else weight.double()
        if factor.groups != groups:  # depthwise: one kernel a channel
            weight = weight.unflatten(0, (groups, -1))
            product = weight if product is None else product * weight
            continue
        weight = weight.unflatten(0, (groups, -1))
        # Each axis has several taps in one factor only, so convolving the kernels is a product.
        product = weight if product is None else torch.einsum("gom...,gmi...->goi...", weight, product)
    assert product is not None
    return product.flatten(0, 1)


@torch.no_grad()
def error(layer: Conv, module: FactorisedConv) -> float:
    """Relative squared error of the kernel, |K - K'|^2 / |K|^2; 0 for a kernel of zeros met exactly."""
    product = kernel(module)
    weight = layer.weight.detach().to(product)
    wrong, size = float((weight - product).square().sum()), float(weight.square().sum())
    return wrong / size if size else (math.inf if wrong else 0.0)


@torch.no_grad()
def merge(module: FactorisedConv) -> nn.Module:
    """Make the dense ``Conv1d`` or ``Conv2d`` that gives the same outputs as the chain."""
    first: Any = module[0]
    dense = type(first)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    dense.weight.copy_(kernel(module))
    if module.bias is not None:
        dense.bias.copy_(module.bias)
    return dense.train(module.training)


def _module(layer: Conv, piece: _Piece, *, bias: bool, padding_mode: str) -> nn.Module:
    make: Any = type(layer)
    return make(
        piece.inputs,
        piece.outputs,
        piece.kernel,
        stride=piece.stride,
        padding=piece.padding,
        dilation=piece.dilation,
        groups=piece.groups,
        bias=bias,
        padding_mode=padding_mode,
    )


def _pieces(layer: Conv, kind: str, ranks: Sequence[int]) -> list[_Piece]:
    """The chain of one form, first factor first."""
    _check(layer, kind, ranks)
    groups, axes = layer.groups, spatial_axes(layer)
    outputs, inputs = channels(layer)
    everything = tuple(range(len(layer.kernel_size)))
    if kind == "tucker2" and axes:
        widths, parts = [inputs, *ranks, outputs], [(), everything, ()]
    else:
        inner = [ranks[0]] * (len(axes) + 1) if kind == "cp" else list(ranks)
        inner = inner if axes else [ranks[0]]
        widths = [inputs, *inner, outputs]
        parts = [(), *((axis,) for axis in axes), ()]
        # What has one tap still has a stride and padding; any one factor may take it, the first is cheapest.
        first = min(1, len(axes))
        parts[first] += tuple(axis for axis in everything if axis not in axes)
    depthwise = [kind == "cp" and 0 < at < len(parts) - 1 for at in range(len(parts))]
    if kind != "cp":
        if widths[0] == widths[1]:
            widths, parts, depthwise = widths[1:], [parts[0] + parts[1], *parts[2:]], depthwise[1:]
        if len(parts) > 1 and widths[-1] == widths[-2]:
            widths, parts, depthwise = widths[:-1], [*parts[:-2], parts[-2] + parts[-1]], depthwise[:-1]
    return [
        _piece(layer, a * groups, b * groups, groups * (a if alone else 1), part)
        for (a, b), part, alone in zip(pairwise(widths), parts, depthwise, strict=True)
    ]


def _piece(layer: Conv, inputs: int, outputs: int, groups: int, axes: tuple[int, ...]) -> _Piece:
    """A factor with the taps, the stride and the padding of these axes, and one tap on all others."""
    count = len(layer.kernel_size)

    def on(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
        return tuple(values[a] if a in axes else otherwise for a in range(count))

    padding: tuple[int, ...] | str
    if layer.padding == "same":
        spans = on([d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)], 0)
        # As numbers where they are even on both sides: onnxruntime refuses 'same' beside a dilation.
        padding = "same" if any(span % 2 for span in spans) else tuple(span // 2 for span in spans)
    else:
        padding = on((0,) * count if isinstance(layer.padding, str) else layer.padding, 0)
    return _Piece(
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        kernel=on(layer.kernel_size, 1),
        stride=on(layer.stride, 1),
        padding=padding,
        dilation=on(layer.dilation, 1),
    )


def _check(layer: Conv, kind: str, ranks: Sequence[int]) -> None:
    if kind not in KINDS:
        raise InputError(
            f"unknown form '{kind}' of a factorised convolution; choose one of: {', '.join(KINDS)}"
        )
    axes = spatial_axes(layer)
    count = {"tucker2": 2, "cp": 1, "tensor-train": len(axes) + 1}[kind]
    shape = "x".join(map(str, layer.weight.shape))
    if len(ranks) != count or any(rank < 1 for rank in ranks):
        raise InputError(
            f"ranks {list(ranks)} do not fit: {kind} of a {shape} kernel takes {count} of at least 1"
        )
    outputs, inputs = channels(layer)
    if kind == "tucker2":
        if ranks[0] > inputs or ranks[1] > outputs:
            raise InputError(
                f"ranks {list(ranks)} exceed the {inputs} inputs and {outputs} outputs of a group"
            )
        if not axes and ranks[0] != ranks[1]:
            raise InputError(
                f"ranks {list(ranks)} differ, but a kernel of one tap is a matrix and has one rank"
            )
    elif kind == "tensor-train" and any(r > m for r, m in zip(ranks, train_limits(layer), strict=True)):
        raise InputError(f"ranks {list(ranks)} exceed {list(train_limits(layer))}, the full ones")


def train_limits(layer: Conv) -> tuple[int, ...]:
    """The ranks of an exact tensor train of the kernel, read as (I/G, *taps, O/G)."""
    outputs, inputs = channels(layer)
    sizes = [inputs, *(layer.kernel_size[a] for a in spatial_axes(layer)), outputs]
    return tuple(min(math.prod(sizes[:at]), math.prod(sizes[at:])) for at in range(1, len(sizes)))
