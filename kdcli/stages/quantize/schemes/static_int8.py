"""Static int8: weights as 8-bit integers with a scale a row, activations rounded with ranges fixed beforehand.

Weights are rounded as dynamic-int8 does. What a matrix is multiplied by gets a range (low, high) from rows of
training data (``--calibration``, ``--calibration-samples``) and is rounded to uint8,

    s = (high - low) / 255,   z = round(-low / s),   x ~ s * (clip(round(x / s) + z, 0, 255) - z)

Products are sums of integers; their outputs are floats again, except those of convolutions, which have a range
of their own. Layer norms, GELU, residual sums and softmax are computed in float; ``operators`` rounds their
outputs too, in a graph without fusions.

Fixed ranges save the pass over the activations that finds them at run time, and make an answer independent
of the other rows of its batch. They cost accuracy where the rows of the calibration do not show what comes later.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, sections 2.1 and 2.2.
Differs: ranges are found after training and not during it; outputs of products stay float, because every
operator that follows them in an encoder is one that eight bits would ruin.
"""

from __future__ import annotations

from pydantic import Field, field_validator
from torch import Tensor

from kdcli.errors import did_you_mean
from kdcli.models.integers import Integers
from kdcli.stages.quantize import nearest
from kdcli.stages.quantize.ranges import PERCENTILE
from kdcli.stages.quantize.schemes import dynamic_int8

CONVOLUTIONS = True  # are quantised too: QLinearConv


_OPERATORS = ("layernorm", "gelu", "add", "softmax")


class Config(dynamic_int8.Config):
    """Parameters of static int8 quantisation: those of dynamic-int8 and of the calibration."""

    percentile: float = Field(
        PERCENTILE, gt=50, le=100, description="--calibration percentile: share of values inside, in percent"
    )
    operators: str = Field(
        "",
        description="outputs to round as well, by commas: layernorm, gelu, add (residual sums), softmax; "
        "most models do not survive it",
    )

    @field_validator("operators")
    @classmethod
    def _known(cls, value: str) -> str:
        for name in value.split(",") if value else []:
            if name not in _OPERATORS:
                raise ValueError(f"unknown operator '{name}': {did_you_mean(name, _OPERATORS)}")
        return value


def quantise(weight: Tensor, config: Config) -> Integers:
    """Round a matrix (O, I), or the filters of a convolution (O, I, ...), each row or filter with its own scale.

    Returns:
        Integers of the weight's shape, with scales (O, 1) or (O, 1, ...).
    """
    found = nearest.symmetric(weight.flatten(1), config.bits, limit=dynamic_int8.limit(config))
    if weight.ndim == 2:
        return found
    scale = found.scale.view(-1, *[1] * (weight.ndim - 1))
    return Integers(found.values.view(weight.shape), scale, None, found.bits)
