"""Dynamic int8: weights as 8-bit integers with a scale a row, activations rounded at run time.

For a weight W (O, I), row by row (an embedding table: entry by entry),

    s_o = max_i |W_oi| / L,   q_oi = round(W_oi / s_o),   W_oi ~ q_oi * s_o,   |W_oi - q_oi * s_o| <= s_o / 2

with L = 64 (``reduce_range``) or L = 127, zero point 0, ties to even. Tables always have L = 127. Activations
are rounded to uint8 when they are known, with one scale and zero point a tensor (in the ONNX graph:
DynamicQuantizeLinear).

Why 64: x86 processors without VNNI multiply uint8 by int8 with VPMADDUBSW, which adds two products in
16 bits and saturates above 32767 without a word: 2 * 255 * 64 = 32640 fits, 2 * 255 * 127 = 64770 does not.
Being a power of two, 64 also makes s_o exact: quantising the rounded weights gives the same q and s again.
Tables are looked up and never multiplied, so they cannot saturate. One scale an entry and L = 127 moves the
logits of MiniLM on CLINC150 half as far as one scale a table does, or L = 64 (0.009 against 0.016 and 0.017).

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 2.1, with zero point 0; a scale a row as in
Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", arXiv:1806.08342.
The matrices are those of onnxruntime's quantize_dynamic(per_channel=True, reduce_range=...).
Differs: embeddings have a scale a row, where onnxruntime has one scale and zero point a table.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

BITS = 8  # of storage


class Config(BaseModel):
    """Parameters of dynamic int8 quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reduce_range: bool = Field(
        True, description="matrices within [-64, 64], so that no processor saturates; false: [-127, 127]"
    )


def limit(config: Config, *, table: bool = False) -> int:
    """L, the largest magnitude of an integer."""
    return 64 if config.reduce_range and not table else 127


def quantise(weight: Tensor, config: Config, *, table: bool = False) -> tuple[Tensor, Tensor]:
    """Round a matrix to integers, each row with its own scale.

    Args:
        weight: (O, I) of finite floats; an embedding table is (entries, features).
        config: The range of matrices.
        table: Rows are looked up, not multiplied.

    Returns:
        Integers (O, I) int8 and scales (O, 1) float32, on the weight's device. A row of zeros has scale 1.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1, keepdim=True) / limit(config, table=table)
    # A subnormal scale has too few digits to divide by; such a row is zero for any practical purpose.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return (weight / scale).round().to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply integers (O, I) by their scales (O, 1); float32 (O, I)."""
    return values.float() * scale
