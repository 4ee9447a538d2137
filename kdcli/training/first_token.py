"""Compute the last layer of an encoder for the first token only: a classifier reads no other.

Keys and values still come from every token; queries, the output projection and the feed-forward part, which are
three quarters of a layer, are computed for one token in T. The logits are the same but for rounding. Measured
for a student of 2 layers of 128 on CLINC150: 1.6 times as many rows a second in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kdcli import families
from kdcli.families.family import FirstToken
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.input_names import MASK
from kdcli.models.checkpoint import Checkpoint
from kdcli.training.terms import Needs


@contextlib.contextmanager
def first_token_only(checkpoint: Checkpoint, needs: Needs) -> Iterator[bool]:
    """Shorten the last layer inside the block, unless somebody reads more of it than its first token.

    Args:
        checkpoint: The model; nothing of it is changed but how its last layer runs.
        needs: What is read of it besides its logits.

    Yields:
        Whether it was shortened.
    """
    family = families.encoders().get(checkpoint.model_type)
    if family is None or family.first_token is None:
        yield False
        return
    layer = encoder_layers(checkpoint.model, family)[-1]
    number = layer.index + 1
    if number in needs.hidden or number in needs.attention or not layer.heads or not layer.neurons:
        yield False
        return
    module: Any = layer.module
    module.forward = _forward(layer, family.first_token)
    try:
        yield True
    finally:
        del module.forward


def _forward(layer: Layer, parts: FirstToken) -> Any:
    module: Any = layer.module
    dropout: Any = module.get_submodule(parts.dropout)
    attention_output, ffn_in, ffn_out = (
        module.get_submodule(path) for path in (parts.attention_output, parts.ffn_in, parts.ffn_out)
    )

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, layer.head_size)).transpose(1, 2)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, T, D) to the state of the first token, (B, 1, D)."""
        first = hidden_states[:, :1]
        whole = args[0] if args else kwargs.get(MASK)  # (B, 1, T, T), as a layer gets it
        mask = None if whole is None else whole[:, :, :1]
        dropped = dropout.p if module.training else 0.0
        mixed = F.scaled_dot_product_attention(
            heads(layer.query(first)),
            heads(layer.key(hidden_states)),
            heads(layer.value(hidden_states)),
            attn_mask=mask,
            dropout_p=dropped,
        )
        attended = attention_output(mixed.transpose(1, 2).flatten(2), first)
        shortened: Tensor = ffn_out(ffn_in(attended), attended)
        return shortened

    return forward
