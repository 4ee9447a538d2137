"""SmoothQuant: move the range of activations into the weights that read them, column by column.

For an input x (I features) and the matrices W that read it, all of them together,

    s_j = max|x_j|^alpha / max|W_oj|^(1 - alpha),     y = (W diag(s)) (diag(1/s) x)

The product is the same, but features with outliers become smaller before they are rounded with one scale for
all, and the weights, which have a scale a row, become larger there. alpha = 0.5 gives either the same range;
more takes more from the activations.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML, arXiv:2211.10438, equations 3 and 4.
Differs: the paper folds 1/s into the layer norm in front. In BERT the layer norm stands behind the residual sum,
so its output is read by that sum as well, and the division has to be carried out; only the factors of the
attention output fold, into the rows of the value projection. Features that are zero on all calibration rows, or
that no weight reads, keep s = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

SMALLEST = 1e-5  # as in the published code


class Config(BaseModel):
    """Parameters of SmoothQuant."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    smooth: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="alpha: how much of the range of activations weights take over; 0 turns it off",
    )


def factors(largest: Tensor, weights: Sequence[Tensor], config: Config) -> Tensor:
    """How much each input feature is divided by, and each column of the weights multiplied.

    Args:
        largest: (I,) largest magnitude of every input feature over the calibration rows, at least 0.
        weights: Every matrix (O, I) that reads this input; O may differ.
        config: Alpha.

    Returns:
        s, (I,) float32, positive.
    """
    columns = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    largest = largest.float()
    alpha = config.smooth
    found = largest.clamp(min=SMALLEST) ** alpha / columns.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), found.clamp(min=SMALLEST), torch.ones_like(found))
