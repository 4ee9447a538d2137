"""How quantised weights lie on the disk: the tensors, and the words of config.json, of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.models.integers import Integers, pack, unpack
from kdcli.models.transforms import Layout, Quantise, TransformLog

SCALE_SUFFIX = "_scale"
ZERO_SUFFIX = "_zero_point"
PACKED_SUFFIX = "_packed"
SHAPE_SUFFIX = "_shape"
_FORMATS = {True: "int-quantized", False: "pack-quantized"}  # by whether an integer fills its byte
FOREIGN = "kdcli"
"""Format of what compressed-tensors has no words for: it stops at a word that it does not know."""


def stored(name: str, matrix: Integers) -> dict[str, Tensor]:
    """The tensors that a quantised weight becomes on the disk."""
    values, scale, zero, bits = matrix.values, matrix.scale, matrix.zero, matrix.bits
    made = {name + SCALE_SUFFIX: scale.contiguous()}
    if bits == 8:
        made[name] = values.contiguous()
        if zero is not None:
            made[name + ZERO_SUFFIX] = zero.contiguous()
        return made
    if bits == 1:
        values = (values - 1) // 2  # the two values of one bit are -1 and 0
    made[name + PACKED_SUFFIX] = pack(values, bits)
    made[name + SHAPE_SUFFIX] = torch.tensor(values.shape)
    if zero is not None:
        made[name + ZERO_SUFFIX] = pack(zero.T, bits).T.contiguous()
    return made


def _take(state: dict[str, Tensor], name: str, layout: Layout) -> Integers:
    """Remove the tensors of a quantised weight from ``state`` and read them.

    Raises:
        KeyError, ValueError, RuntimeError: They are missing or do not fit together.
    """
    bits = layout.bits
    scale = state.pop(name + SCALE_SUFFIX).float()
    zero = None if layout.symmetric else state.pop(name + ZERO_SUFFIX)
    if bits == 8:
        values = state.pop(name)
    else:
        rows, columns = (int(n) for n in state.pop(name + SHAPE_SUFFIX))
        values = unpack(state.pop(name + PACKED_SUFFIX), bits, columns)
        values = 2 * values + 1 if bits == 1 else values
        zero = None if zero is None else unpack(zero.T, bits, rows).T
    if values.is_floating_point() or values.ndim < 2 or values.shape[1] % scale.shape[1]:
        raise ValueError("the integers and their scales do not fit together")
    return Integers(values, scale, zero, bits)


def configuration(model: nn.Module, log: TransformLog) -> dict[str, Any]:
    """Describe the integer weights of a model, for config.json.

    Without it plain transformers would read the integers as if they were the weights; with it, it
    multiplies them out when that library is installed and refuses when it is not. What the format cannot
    describe has the format :data:`FOREIGN`, which is refused in any case. (An unknown ``quant_method`` would not
    be: transformers warns and reads on.)
    """
    assert log.quantised is not None
    layouts = layouts_of(log.quantised)
    modules = dict(model.named_modules())
    quantised = {name.removesuffix(".weight") for layout in layouts for name in layout.tensors}
    ignored = sorted(
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in quantised
    )
    # Of bits of -1 and 1, and of inputs that are multiplied first, that format knows nothing.
    covered = all(layout.bits > 1 for layout in layouts) and not log.smoothed
    groups = {}
    for number, layout in enumerate(layouts):
        # The format has to stand in the group: the one above it is not read, and packed integers are assumed.
        layer = {"num_bits": layout.bits, "type": "int", "symmetric": layout.symmetric, "dynamic": False}
        layer |= {"strategy": "channel"} if layout.group is None else {"strategy": "group"}
        layer |= {} if layout.group is None else {"group_size": layout.group}
        names = sorted(name.removesuffix(".weight") for name in layout.tensors)
        kinds = sorted({type(modules[name]).__name__ for name in names})
        groups[f"group_{number}"] = {
            "targets": kinds if len(layouts) == 1 else names,
            "weights": layer,
            "format": _FORMATS[layout.bits == 8] if covered else FOREIGN,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def layouts_of(log: Quantise) -> list[Layout]:
    """Every stored layout, that of the first version of the log among them."""
    named = {name for layout in log.layouts for name in layout.tensors}
    rest = [name for name in log.tensors if name not in named]
    return [*log.layouts, *([Layout(bits=8, tensors=rest)] if rest else [])]


def layouts_for(integers: Mapping[str, Integers]) -> list[Layout]:
    """Describe how :func:`stored` stores these weights, for the log."""
    found: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, matrix in sorted(integers.items()):
        found.setdefault((matrix.bits, matrix.group, matrix.zero is None), []).append(name)
    return [Layout(bits=b, group=g, symmetric=s, tensors=names) for (b, g, s), names in found.items()]


def dequantise(state: dict[str, Tensor], name: str, layout: Layout) -> Tensor:
    """Take a quantised weight out of ``state`` and multiply its integers by their scales.

    Raises:
        InputError: It is missing, or is not what the log promises.
    """
    try:
        return _take(state, name, layout).dense()
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"model.safetensors holds no integers with scales for '{name}', which kdcli.json promises"
        ) from error
