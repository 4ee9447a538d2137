r"""Magnitude pruning: the weights, heads or neurons closest to zero go, without a look at any data.

Single weights are ranked by $|w|$. With scope ``global`` the $k = \mathrm{round}(\text{sparsity} \cdot n)$ smallest
among the $n$ weights of all matrices together are zeroed, with scope ``layer`` the same share of each matrix; with
N:M the $M - N$ smallest of every $M$ neighbours along the input. Of equal magnitudes at the limit the earlier ones
go (matrices in their order, each row by row), so that the number of zeros is exact.

A head or a neuron $u$ has the score

    s_u = \sum_{w \in u} |w| \;\; (\text{l1}) \qquad \text{or} \qquad s_u = \sum_{w \in u} w^2 \;\; (\text{l2})

over the weights that go with it: a head's rows of query, key and value and its columns of the attention
output, a neuron's row of the first feed-forward layer and its column of the second.

Sources: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
arXiv:1506.02626, section 3 (weights); Li et al. 2017, "Pruning Filters for Efficient ConvNets",
arXiv:1608.08710, section 3.1 (l1 of a unit); Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks",
arXiv:2104.08378, section 3 (2:4).
Differs: the number of zeros is given, where Han gives a threshold (a multiple of each layer's standard
deviation); pruning and training do not alternate. Li ranks the filters of each layer by itself; here heads
and neurons of all layers compete for one budget by score per cost, for which l2 is squared: sums of squares
add up over units, norms do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.families.layer import Layer
from kdcli.families.modules import LowRankLinear, Projection
from kdcli.stages.prune.budget import search
from kdcli.stages.prune.criterion import Criterion, Pattern, UnitJob, Units, UnitsCut, WeightJob
from kdcli.stages.prune.masks import keep

Norm = Literal["l1", "l2"]


class Config(BaseModel):
    """Parameters of magnitude pruning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scope: Literal["global", "layer"] = Field(
        "global", description="weights: rank those of all matrices together, or of every matrix by itself"
    )
    norm: Norm = Field("l1", description="heads and neurons: sum of |w|, or of its square")


def masks(weights: Mapping[str, Tensor], pattern: Pattern, config: Config) -> dict[str, Tensor]:
    """Which weights stay.

    Args:
        weights: Matrices (O, I) by name.
        pattern: The share of the weights to zero, those included that are zero already; or N of M.
        config: The scope.

    Returns:
        Boolean tensors of the same names, shapes and devices; False where a weight goes.
    """
    return keep({name: w.detach().abs() for name, w in weights.items()}, weights, pattern, config.scope)


def zero(job: WeightJob, config: Config) -> dict[str, Tensor]:
    """Which weights stay, by their magnitude."""
    return masks({name: layer.weight for name, layer in job.matrices.items()}, job.pattern, config)


def importance(layers: list[Layer], norm: Norm) -> Units:
    """Magnitude of every head and neuron, float64; arrays of length 0 where a layer has none left.

    In a layer that was factorised the weights of a unit are those of the factor that holds it.
    """
    heads, neurons = (
        [np.zeros(layer.heads) for layer in layers],
        [np.zeros(layer.neurons) for layer in layers],
    )
    for layer, of_heads, of_neurons in zip(layers, heads, neurons, strict=True):
        if layer.heads:
            for projection in (layer.query, layer.key, layer.value):
                of_heads += _sums(_outer(projection), 1, norm).reshape(layer.heads, -1).sum(1)
            of_heads += _sums(_inner(layer.attention_output), 0, norm).reshape(layer.heads, -1).sum(1)
        if layer.neurons:
            of_neurons += _sums(_outer(layer.ffn_in), 1, norm) + _sums(_inner(layer.ffn_out), 0, norm)
    return Units(heads, neurons)


def prune(job: UnitJob, config: Config) -> UnitsCut:
    """Cut by magnitude, in one step: what is left does not change while the rest is cut."""
    return search(job, lambda: (importance(list(job.layers), config.norm), None), 1)


def _sums(layer: nn.Linear, axis: int, norm: Norm) -> np.ndarray:
    """Sum over one axis of (O, I)."""
    weight = layer.weight.detach().cpu().double()
    found: np.ndarray = (weight.abs() if norm == "l1" else weight.square()).sum(axis).numpy()
    return found


def _outer(projection: Projection) -> nn.Linear:
    return projection.second if isinstance(projection, LowRankLinear) else projection


def _inner(projection: Projection) -> nn.Linear:
    return projection.first if isinstance(projection, LowRankLinear) else projection


METHOD = Criterion(config=Config, zero=zero, prune=prune)
