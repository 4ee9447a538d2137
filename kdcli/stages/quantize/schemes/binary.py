r"""Binary weights: every weight is -a or a, trained with the full-precision model as teacher.

    q_i = \begin{cases} 1 & w_i \ge 0 \\ -1 & w_i < 0 \end{cases} \qquad a = \text{mean}\; |w_i|

which minimises $\lVert w - a q \rVert$, with one $a$ for every row of a matrix. The float weights are trained and
rounded anew at every step; gradients go through the rounding as if it were not there. The loss is that of ternary.

Source: Rastegari et al. 2016, "XNOR-Net", ECCV, arXiv:1603.05279, section 3.1 (binary weights); Bai et al. 2021,
"BinaryBERT: Pushing the Limit of BERT Quantization", ACL, arXiv:2012.15701 (the loss and what is left out).
Differs: BinaryBERT trains a ternary model of half the width and splits its weights into two binary ones; here
the model keeps its size and its signs are trained directly, which the paper finds worse. A scale a row in place
of one a matrix gives part of that back. The token table is ternary or as --embeddings says. Activations are those of
``ternary``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.stages.quantize import qat
from kdcli.stages.quantize.scheme import Scheme, Training
from kdcli.stages.quantize.schemes import ternary

BITS = 1


class Config(ternary.Config):
    """Parameters of binary quantisation."""

    scale: Literal["matrix", "row"] = Field("row", description="what shares one a in a matrix")
    tables: bool = Field(True, description="the token table is ternary; false: as --embeddings says")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")


def quantise(weight: Tensor, config: Config, *, table: bool = False) -> Integers:
    """Round a matrix to -1 and 1; a table as :func:`kdcli.stages.quantize.schemes.ternary.quantise` does.

    Args:
        weight: (O, I) of finite floats.
        config: What shares a scale.
        table: Of tokens.

    Returns:
        Integers of 1 bit (a table: 2 bits) with scales (O, 1). A weight of 0 becomes a; what is all zeros has
        scale 0 and stays so.
    """
    if table:
        return ternary.quantise(weight, config, table=True)
    weight = weight.detach().float()
    shared = weight if config.scale == "row" else weight.reshape(1, -1)
    scale = shared.abs().mean(1, keepdim=True).expand(len(weight), 1)
    values = torch.where(weight >= 0, 1, -1).to(torch.int8)
    return Integers(values, scale.contiguous(), None, BITS)


def training(config: Config) -> Training:
    """The encoder, and where ``tables`` says so the token table."""
    return Training(
        quantise=quantise,
        epochs=3,
        everywhere=False,
        ranges=config.activations == "8",
        pack=True,
        zeros=False,
    )


METHOD = Scheme(
    config=Config, apply=qat.apply, check=qat.check, training=training, operators=ternary.operators
)
