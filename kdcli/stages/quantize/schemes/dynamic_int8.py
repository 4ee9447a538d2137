"""Dynamic int8: weights as 8-bit integers with a scale a row, activations rounded at run time.

For a weight W (O, I), row by row (an embedding table: entry by entry),

    s_o = max_i |W_oi| / L,   q_oi = round(W_oi / s_o),   W_oi ~ q_oi * s_o,   |W_oi - q_oi * s_o| <= s_o / 2

with L = 64 (``reduce_range``) or L = 127, zero point 0, ties to even; with b < 8 ``bits``, L = 2^(b-1) - 1.
Tables always have L = 127. Activations are rounded to uint8 when they are known, with one scale and zero point
a tensor (in the ONNX graph: DynamicQuantizeLinear).

Why 64: x86 processors without VNNI multiply uint8 by int8 with VPMADDUBSW, which adds two products in
16 bits and saturates above 32767 without a word: 2 * 255 * 64 = 32640 fits, 2 * 255 * 127 = 64770 does not.
Being a power of two, 64 also makes s_o exact: quantising the rounded weights gives the same q and s again.
Tables are looked up and never multiplied, so they cannot saturate. One scale an entry and L = 127 moves the
logits of MiniLM on CLINC150 half as far as one scale a table does, or L = 64 (0.009 against 0.016 and 0.017).

The other way out is ``unsigned``: L = 127, and the graph holds q + 128 as uint8 with zero point 128. Products of
two uint8 are summed in 32 bits by every kernel, which is slower where VPMADDUBSW would have been used.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 2.1, with zero point 0; a scale a row as in
Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", arXiv:1806.08342.
The matrices are those of onnxruntime's quantize_dynamic(per_channel=True, reduce_range=...).
Differs: embeddings have a scale a row, where onnxruntime has one scale and zero point a table.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.stages.quantize import nearest


class Config(BaseModel):
    """Parameters of dynamic int8 quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: int = Field(
        8, ge=2, le=8, description="of a weight; the graph multiplies 8-bit integers whatever it is"
    )
    reduce_range: bool = Field(
        True, description="matrices within [-64, 64], so that no processor saturates; false: [-127, 127]"
    )
    unsigned: bool = Field(
        False, description="[-127, 127] as uint8 in the graph: no processor saturates, some are slower"
    )
    smooth: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="SmoothQuant's alpha: how much of the range of activations weights take over",
    )


def limit(config: Config) -> int:
    """L, the largest magnitude of an integer of a matrix."""
    if config.bits < 8:
        return (1 << (config.bits - 1)) - 1
    return 64 if config.reduce_range and not config.unsigned else 127


def quantise(weight: Tensor, config: Config) -> Integers:
    """Round a matrix (O, I) of finite floats to integers, each row with its own scale."""
    return nearest.symmetric(weight, config.bits, limit=limit(config))
