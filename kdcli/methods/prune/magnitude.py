"""Magnitude pruning: the weights closest to zero become zero; nothing gets smaller or faster by itself.

With scope ``global`` the k = round(sparsity * n) smallest |w| among the n weights of all matrices together
are zeroed, with scope ``layer`` the same share of each matrix. Of equal magnitudes at the limit the
earlier ones go (matrices in their order, each row by row), so that the number of zeros is exact.

Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
arXiv:1506.02626, section 3. Differs: the number of zeros is given, where the paper gives a threshold
(a multiple of each layer's standard deviation); pruning and training do not alternate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.methods.pruning import WeightJob

STRUCTURES = ("weights",)


class Config(BaseModel):
    """Parameters of magnitude pruning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scope: Literal["global", "layer"] = Field(
        "global", description="rank the weights of all matrices together, or of every matrix by itself"
    )


def masks(weights: Mapping[str, Tensor], sparsity: float, config: Config) -> dict[str, Tensor]:
    """Which weights stay.

    Args:
        weights: Matrices of any shapes by name.
        sparsity: Share of the weights to zero, in [0, 1]; those that are zero already count.
        config: The scope.

    Returns:
        Boolean tensors of the same names, shapes and devices; False where a weight goes.
    """
    if config.scope == "layer":
        flat = [_keep(_magnitudes(w), sparsity) for w in weights.values()]
    else:
        kept = _keep(torch.cat([_magnitudes(w) for w in weights.values()]), sparsity)
        flat = list(kept.split([w.numel() for w in weights.values()]))
    return {
        name: part.view(w.shape).to(w.device) for (name, w), part in zip(weights.items(), flat, strict=True)
    }


def zero(job: WeightJob, config: Config) -> dict[str, Tensor]:
    """Which weights stay, by their magnitude."""
    return masks({name: layer.weight for name, layer in job.matrices.items()}, job.pattern.sparsity, config)


def _magnitudes(weight: Tensor) -> Tensor:
    # On the CPU, where selecting the k-th value is deterministic.
    return weight.detach().cpu().abs().flatten()


def _keep(magnitudes: Tensor, sparsity: float) -> Tensor:
    count = round(sparsity * len(magnitudes))
    if count == 0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    limit = magnitudes.kthvalue(count).values
    kept = magnitudes > limit
    surplus = len(kept) - int(kept.sum()) - count  # equal to the limit, and one too many
    if surplus:
        kept[torch.nonzero(magnitudes == limit)[-surplus:, 0]] = True
    return kept
