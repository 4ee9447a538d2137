"""Multiply-accumulates of one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def macs(model: Any, tokens: int) -> int:
    """Count the multiply-accumulates of one row of ``tokens`` tokens.

    torch's counter sees matrix products only, which is where an encoder spends its time. It counts a
    fused attention on the CPU as nothing, so the model must use eager attention, as kdcli loads it.

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
    counter = FlopCounterMode(display=False)
    # With gradients on, because the counter's module tracker fails on an expanded parameter without.
    with torch.inference_mode(False), torch.enable_grad(), counter:
        first = int(model.config.pad_token_id or 0) + 3
        ids = torch.full(
            (1, tokens), first % int(getattr(model.config, "vocab_size", first + 1)), device=device
        )
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() // 2
