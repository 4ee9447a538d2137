r"""Tensor train: a 1x1 convolution, one along each axis of the kernel, and a 1x1 convolution again.

A kernel of one group, read as (I, h, w, O), with ranks $R_1, R_2, R_3$:

    K_{ixyo} \approx \sum_{a,b,c} P_{ia}\, X_{axb}\, Y_{byc}\, Q_{co}

and so on for any number of axes; those with one tap take no part. The factors come from one truncated SVD after the
other, and $\lVert K - K' \rVert^2$ is at most the sum, over the ranks, of the squared singular values that the
unfolding at that place drops. A rank of all inputs or outputs leaves that end out; a 1x1 kernel is a matrix and
gets its SVD.

Source: Oseledets 2011, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33(5), algorithm 1 and theorem 2.2;
for convolutions Garipov et al. 2016, "Ultimate Tensorization: compressing convolutional and FC layers alike",
arXiv:1611.03214.
Differs: Garipov et al. also split the channels into several modes, which gives a layer that is no chain of plain
convolutions; here a channel stays one mode, as in tensorly's own order of them. Each group of channels has its own
factors of the same ranks. The SVDs are tensorly's ``tensor_train``, in float64; it lowers ranks that it cannot fill
without saying so, and what is missing is then zero here. The last factor's scale is spread over all of them.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import tensorly
import torch
from pydantic import BaseModel, ConfigDict
from tensorly.decomposition import tensor_train
from torch import Tensor
from torch.nn.functional import pad

from kdcli.models import conv_factors
from kdcli.models.conv_factors import Conv, FactorisedConv
from kdcli.stages.lowrank import evbmf, rank_ladder
from kdcli.stages.lowrank.rule import ConvolutionRule, ConvRanks


class Config(BaseModel):
    """The tensor train has no parameters of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def full(layer: Conv) -> ConvRanks:
    """ConvRanks at which the layer is reproduced exactly."""
    return conv_factors.train_limits(layer)


def ladder(layer: Conv) -> list[ConvRanks]:
    """From all ranks 1 upwards, each step the rank whose next direction saves the most error for its parameters."""
    dense = sum(p.numel() for p in layer.parameters())
    energies, most = _energies(layer), full(layer)
    ranks: ConvRanks = (1,) * len(most)
    steps: list[tuple[ConvRanks, int]] = []
    cost = conv_factors.parameters(layer, "tensor-train", ranks)
    while cost < dense:
        steps.append((ranks, cost))
        best, gain = None, -1.0
        for at in range(len(ranks)):
            wider = (*ranks[:at], ranks[at] + 1, *ranks[at + 1 :])
            if wider != _clip(layer, wider):
                continue
            own = conv_factors.parameters(layer, "tensor-train", wider)
            # Where an end is left out the cost can fall.
            worth = float(energies[at][ranks[at]]) / max(own - cost, 1e-3)
            if worth > gain:
                best, gain = (wider, own), worth
        if best is None:
            break
        ranks, cost = best
    kept: list[tuple[ConvRanks, int]] = []
    for step in reversed(steps):  # what costs more than a later, better step is none
        if not kept or step[1] < kept[-1][1]:
            kept.append(step)
    kept.reverse()
    return [kept[i][0] for i in rank_ladder.spread([cost for _, cost in kept])]


def by_rank(layer: Conv, rank: int) -> ConvRanks:
    """``rank`` at every place that has as many."""
    return _clip(layer, (rank,) * len(full(layer)))


def by_energy(layer: Conv, energy: float) -> ConvRanks:
    """Every place drops an equal part of what may be lost, so the kernel keeps at least this share of its energy."""
    found = []
    for energies in _energies(layer):
        allowed = (1 - energy) / len(full(layer)) * energies.sum()
        tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        found.append(max(1, int((tails > allowed + 1e-12 * energies.sum()).sum())))
    return _clip(layer, tuple(found))


def by_evbmf(layer: Conv) -> ConvRanks:
    """What variational Bayes finds above the noise in the unfolding at every place, the most of any group."""
    return _clip(layer, tuple(max(evbmf.rank(m) for m in place) for place in _unfoldings(layer)))


@torch.no_grad()
def decompose(layer: Conv, ranks: ConvRanks, config: Config) -> FactorisedConv:
    """The factors by successive truncated SVDs.

    Args:
        layer: Its kernel is (O, I/G, *k).
        ranks: R1 to Rn of each group, n - 1 the number of axes with several taps.
        config: Nothing.

    Returns:
        The chain of convolutions, as :func:`kdcli.models.conv_factors.build` makes it.

    Raises:
        InputError: The layer or the ranks do not fit; see there.
    """
    made = conv_factors.build(layer, "tensor-train", ranks)
    found = [_train(kernel, ranks) for kernel in _trains(layer)]
    return conv_factors.fill(made, layer, [torch.stack(part) for part in zip(*found, strict=True)])


def _train(kernel: Tensor, ranks: ConvRanks) -> list[Tensor]:
    """Factors (R', R, taps) of one group, from its kernel (I, *taps, O)."""
    with tensorly.backend_context("numpy", local_threadsafe=True):
        cores = tensor_train(kernel.numpy(), [1, *ranks, 1]).factors
    wide = [1, *ranks, 1]
    full_size = [
        pad(torch.from_numpy(np.ascontiguousarray(c)), (0, right - c.shape[2], 0, 0, 0, left - c.shape[0]))
        for c, (left, right) in zip(cores, pairwise(wide), strict=True)
    ]
    scale = float(full_size[-1].norm()) or 1.0
    share = scale ** (1 / len(full_size))
    full_size = [core * share for core in full_size[:-1]] + [full_size[-1] / scale * share]
    first, *middle, last = full_size
    return [first[0].T, *(core.permute(2, 0, 1) for core in middle), last[..., 0].T]


def _trains(layer: Conv) -> Tensor:
    """(G, I, *taps, O)."""
    kernels = conv_factors.kernels(layer)
    return kernels.movedim(1, -1)


def _unfoldings(layer: Conv) -> list[list[Tensor]]:
    """At each place, the matrices (what stands before, what stands after) of the groups."""
    trains = _trains(layer)
    places = range(1, trains.ndim - 1)
    return [[kernel.reshape(kernel.shape[:at].numel(), -1) for kernel in trains] for at in places]


def _energies(layer: Conv) -> list[np.ndarray]:
    """At each place the squared singular values, summed over the groups."""
    return [torch.linalg.svdvals(torch.stack(place)).square().sum(0).numpy() for place in _unfoldings(layer)]


def _clip(layer: Conv, ranks: ConvRanks) -> ConvRanks:
    """The nearest ranks none of which is more than its neighbours can use."""
    found = [min(rank, most) for rank, most in zip(ranks, full(layer), strict=True)]
    taps = [layer.kernel_size[axis] for axis in conv_factors.spatial_axes(layer)]
    for at, (left, right) in enumerate(pairwise(range(len(found)))):
        found[right] = min(found[right], found[left] * taps[at])
    for at, (left, right) in reversed(list(enumerate(pairwise(range(len(found)))))):
        found[left] = min(found[left], found[right] * taps[at])
    return tuple(found)


METHOD = ConvolutionRule(
    config=Config,
    full=full,
    ladder=ladder,
    by_rank=by_rank,
    by_energy=by_energy,
    by_evbmf=by_evbmf,
    decompose=decompose,
)
