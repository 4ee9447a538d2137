r"""Ternary weights: every weight is -a, 0 or a, trained with the full-precision model as teacher.

    d = 0.7\; \text{mean}\; |w|
    \qquad q_i = \begin{cases} \mathrm{sign}(w_i) & |w_i| > d \\ 0 & \text{otherwise} \end{cases}
    \qquad a = \underset{|w_i| > d}{\text{mean}}\; |w_i|

with one $a$ for a matrix and one for each row of the token table. The float weights are trained and rounded anew at
every step; gradients go through the rounding as if it were not there. The loss is the divergence from the teacher's
answers, plus the squared differences of attention scores and hidden states of every layer (``tinybert``).

Source: Li and Liu 2016, "Ternary Weight Networks", arXiv:1605.04711, equations 5 and 6; Zhang et al. 2020,
"TernaryBERT: Distillation-aware Ultra-low Bit BERT", EMNLP, arXiv:2009.12812, sections 3.1 and 3.2.
Differs: what matrices read is rounded to 8 bits as in int8-qat, with a range that follows the batches of the
training and is fixed afterwards, where the source takes the least and the largest value of each input
(``activations=float`` rounds nothing). The two products inside attention, which the source rounds too, stay float.
Matrices outside the encoder, the classifier among them, have 8 bits with a scale a row. The divergence from the
teacher's answers has the gradient of the source's cross entropy.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.stages.quantize import qat
from kdcli.stages.quantize.scheme import Scheme, Training

BITS = 2
THRESHOLD = 0.7


class Config(BaseModel):
    """Parameters of ternary quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scale: Literal["matrix", "row"] = Field("matrix", description="what shares one a in a matrix")
    tables: bool = Field(True, description="the token table too; false: as --embeddings says")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    alpha: float = Field(1.0, ge=0, le=1, description="weight of the teacher's answers; labels have the rest")
    temperature: float = Field(1.0, gt=0, description="T of the answers")
    hidden: float = Field(1.0, ge=0, description="weight of the attention scores and hidden states")
    activations: Literal["float", "8"] = Field(
        "8", description="what matrices read: 8-bit integers with ranges found in training, or floats"
    )
    momentum: float = Field(
        0.05, gt=0, le=1, description="activations=8: share of a batch in the average of the ranges"
    )


def quantise(weight: Tensor, config: Config, *, table: bool = False) -> Integers:
    """Round a matrix to -1, 0 and 1.

    Args:
        weight: (O, I) of finite floats.
        config: What shares a scale.
        table: Every row has its own.

    Returns:
        Integers of 2 bits with scales (O, 1), all alike when a matrix shares one. What is all zeros has scale 1.
    """
    weight = weight.detach().float()
    shared = weight if table or config.scale == "row" else weight.reshape(1, -1)
    size = shared.abs()
    kept = size > THRESHOLD * size.mean(1, keepdim=True)
    scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).expand(len(weight), 1)
    values = (shared.sign() * kept).to(torch.int8).view(weight.shape)
    return Integers(values, scale.contiguous(), None, BITS)


def training(config: Config) -> Training:
    """The encoder, and where ``tables`` says so the token table."""
    return Training(
        quantise=quantise, epochs=3, everywhere=False, ranges=config.activations == "8", pack=True
    )


def operators(config: Config) -> tuple[str, ...]:
    """Products of packed integers, where activations stay in float; else of 8-bit ones."""
    return ("MatMulNBits, 2 bits", "MatMulNBits, 8 bits") if config.activations == "float" else ()


METHOD = Scheme(config=Config, apply=qat.apply, check=qat.check, training=training, operators=operators)
