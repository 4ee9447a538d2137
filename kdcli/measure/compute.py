"""Multiply-accumulates of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcli.inputs import kinds
from kdcli.inputs.feeding import accepted

Dims = Sequence[int]


def _lstm(tokens: Dims, first: Dims, second: Dims, *args: Any, **kwargs: Any) -> int:
    """Of a layer in one direction: every token meets both of its matrices."""
    return 2 * math.prod(tokens[:-1]) * (math.prod(first) + math.prod(second))


def _lstms(tokens: Dims, weights: Sequence[Dims], *args: Any, **kwargs: Any) -> int:
    """Of several layers and directions at once; the biases among the weights are no products."""
    return 2 * math.prod(tokens[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


# torch's counter does not know the operators that run an LSTM in one piece, on the CPU and on CUDA.
_OPERATORS = {torch.ops.aten.mkldnn_rnn_layer: _lstm, torch.ops.aten._cudnn_rnn: _lstms}


def macs(model: Any, tokens: int) -> int:
    """Count the multiply-accumulates of one row of ``tokens`` tokens.

    torch's counter sees matrix products and convolutions, which is where a model spends its time; LSTMs are
    added here. It counts a fused attention on the CPU as nothing, so the model must use eager attention, as
    kdcli loads it.

    Args:
        model: A transformers classifier on any device.
        tokens: T, at least 1.

    Returns:
        MACs, half of the floating-point operations that the counter reports.

    Raises:
        ValueError: The model's attention is not eager.
    """
    attention = model.config._attn_implementation
    if attention != "eager":
        raise ValueError(
            f"attention is '{attention}', which the counter does not see; load the model as 'eager'"
        )
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False, custom_mapping=_OPERATORS)
    # With gradients on, because the counter's module tracker fails on an expanded parameter without.
    with torch.inference_mode(False), torch.enable_grad(), counter:
        model(**kinds.of(accepted(model)).row(model.config, tokens, device))
    return counter.get_total_flops() // 2
