"""Half precision: matrices and embedding tables as 16-bit floats, computed in 32 bits.

    w ~ fl16(w),    |w - fl16(w)| <= 2^-11 |w|  for 2^-14 <= |w| <= 65504

to the nearest, ties to even. Vectors (biases, layer norms) stay as they are. Processors without half-precision
arithmetic widen the weights when the model is loaded: half the file, the latency and memory of before.

Source: IEEE 754-2019, binary16, section 3.6 and table 3.5; for weights of trained models Micikevicius et al. 2018,
"Mixed Precision Training", arXiv:1710.03740, section 3.
Differs: activations stay in 32 bits, because few operators of a CPU take 16.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kdcli.errors import InputError

EMBEDDINGS = "fp16"
TABLES = ("fp16", "fp32")


class Config(BaseModel):
    """Half precision has no parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def quantise(weight: Tensor) -> Tensor:
    """Round a tensor of any shape to float16.

    Raises:
        InputError: A weight is larger than float16 can hold.
    """
    rounded = weight.detach().half()
    if not bool(torch.isfinite(rounded).all()):
        largest = float(weight.abs().max())
        raise InputError(
            f"a weight of {largest:.3g} is beyond the 65504 of half precision",
            "keep that layer with --keep-fp32",
        )
    return rounded
