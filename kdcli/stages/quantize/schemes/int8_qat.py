r"""Quantisation-aware training: the model learns with the 8-bit weights and activations it will be run with.

Weights are rounded as static-int8 does, anew at every step, the scale being a row's largest magnitude / $L$;
activations are rounded to uint8 with a range that follows the batches,

    \text{low} \leftarrow (1 - m)\, \text{low} + m \min x \qquad \text{high} \leftarrow (1 - m)\, \text{high} + m \max x

with $m$ the ``momentum``, real tokens only. Gradients go through the rounding as if it were not there. The loss is
the distillation of the model that came in: $(1 - \alpha)\, \mathrm{CE} + \alpha\, T^2\, \mathrm{KL}$, with
$\alpha = 0.9$ and $T = 2$.

Source: Zafrir et al. 2019, "Q8BERT: Quantized 8Bit BERT", arXiv:1910.06188, section 3; Jacob et al. 2018,
arXiv:1712.05877, section 3.
Differs: the teacher's answers take most of the weight of the labels; weights have a scale a row and not a tensor.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.stages.quantize import qat
from kdcli.stages.quantize.scheme import Scheme, Training
from kdcli.stages.quantize.schemes import dynamic_int8


class Config(dynamic_int8.Config):
    """Parameters of int8 quantisation-aware training."""

    momentum: float = Field(0.05, gt=0, le=1, description="share of a batch in the average of the ranges")
    lr: float = Field(5e-5, gt=0, description="peak learning rate")
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the answers of the model that came in")
    temperature: float = Field(2.0, gt=0, description="T of the answers")
    hidden: float = Field(0.0, ge=0, description="weight of the attention scores and hidden states")


def quantise(weight: Tensor, config: Config, *, table: bool = False) -> Integers:
    """Round a matrix (O, I), each row with its own scale."""
    return dynamic_int8.quantise(weight, config)


def training(config: Config) -> Training:
    """All matrices, and what they read."""
    return Training(
        quantise=quantise,
        epochs=1,
        everywhere=True,
        ranges=True,
        unsigned=config.unsigned,
        reduce_range=config.reduce_range,
    )


METHOD = Scheme(config=Config, apply=qat.apply, check=qat.check, training=training)
