r"""CP: a 1x1 convolution, a depthwise one along each axis of the kernel, and a 1x1 convolution again.

A kernel of one group (O, I, h, w) as a sum of $R$ products of vectors:

    K_{oixy} \approx \sum_{r=1}^{R} A_{or}\, B_{ir}\, C_{xr}\, D_{yr}

so $R\,(O + I + h + w)$ weights stand for $O I h w$; axes with one tap take no part. The factors minimise
$\lVert K - K' \rVert^2 + \lambda (\lVert A \rVert^2 + \lVert B \rVert^2 + \lVert C \rVert^2 + \lVert D \rVert^2)$ for
$\lVert K \rVert = 1$ and a tiny $\lambda$, by alternating least squares.

Source: Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR,
arXiv:1412.6553, section 3; the alternation as in Kolda and Bader 2009, "Tensor Decompositions and Applications",
SIAM Review 51(3), section 3.4.
Differs: the paper uses nonlinear least squares. The best approximation of rank R need not exist: components can grow
without bound and cancel each other, which training that follows does not survive. The small penalty forbids that, as
it forbids the singular systems of a kernel whose rank is below R. The alternation is tensorly's ``parafac``, in
float64, with a start of our own: its SVD start asks for more vectors than an axis has. The kernel is scaled to norm
1 first, a kernel of zeros is left out, and the factors of a component get equal norms. Each group of channels has
its own factors of the same rank.
"""

from __future__ import annotations

import math

import numpy as np
import tensorly
import torch
from pydantic import BaseModel, ConfigDict, Field
from tensorly.decomposition import parafac
from torch import Tensor

from kdcli.models import conv_factors
from kdcli.models.conv_factors import Conv, FactorisedConv
from kdcli.stages.lowrank import evbmf, rank_ladder
from kdcli.stages.lowrank.rule import ConvolutionRule, ConvRanks


class Config(BaseModel):
    """Parameters of the CP factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    iterations: int = Field(default=100, ge=1, description="most rounds of alternating least squares")
    tolerance: float = Field(
        default=1e-5,
        gt=0,
        allow_inf_nan=False,
        description="stop when the relative error falls by less than this",
    )
    penalty: float = Field(
        default=1e-4,
        gt=0,
        allow_inf_nan=False,
        description="l, weight of the squared factors beside a kernel of norm 1",
    )
    seed: int = Field(default=0, ge=0, description="of the random start")


def full(layer: Conv) -> ConvRanks:
    """A rank that is certainly enough: the product of all sizes of the kernel but the largest."""
    sizes = _sizes(layer)
    return (math.prod(sizes) // max(sizes),)


def ladder(layer: Conv) -> list[ConvRanks]:
    """ConvRanks from 1 to the last that saves parameters."""
    ranks = range(1, min(_paying(layer), full(layer)[0]) + 1)
    return [(ranks[i],) for i in rank_ladder.spread(ranks)]


def by_rank(layer: Conv, rank: int) -> ConvRanks:
    """``rank``, where the kernel can have as much."""
    return (min(rank, full(layer)[0]),)


def by_energy(layer: Conv, energy: float) -> ConvRanks:
    """The lowest rank found by bisection that keeps this share of the squared weights.

    Above the last rank that saves parameters nothing is tried: a kernel that needs more gets one more than that.
    """
    low, high = 0, _paying(layer) + 1
    while high - low > 1:
        middle = (low + high) // 2
        lost = conv_factors.error(layer, decompose(layer, (middle,), Config()))
        low, high = (low, middle) if 1 - lost >= energy else (middle, high)
    return (min(high, full(layer)[0]),)


def by_evbmf(layer: Conv) -> ConvRanks:
    """The most that variational Bayes finds in any unfolding of any group: no sum of fewer products has that."""
    found = [
        evbmf.rank(kernel.movedim(mode, 0).flatten(1))
        for kernel in conv_factors.kernels(layer)
        for mode in range(kernel.ndim)
    ]
    return by_rank(layer, max(found))


@torch.no_grad()
def decompose(layer: Conv, ranks: ConvRanks, config: Config) -> FactorisedConv:
    """The factors that alternating least squares finds from a seeded start.

    Args:
        layer: Its kernel is (O, I/G, *k).
        ranks: (R,) of each group.
        config: The alternation and its start.

    Returns:
        The chain of convolutions, as :func:`kdcli.models.conv_factors.build` makes it.

    Raises:
        InputError: The layer or the rank does not fit; see there.
    """
    made = conv_factors.build(layer, "cp", ranks)
    found = [_alternate(kernel.numpy(), ranks[0], config) for kernel in conv_factors.kernels(layer)]
    outputs, inputs, *axes = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
    middle: list[Tensor] = [axis.transpose(1, 2)[:, :, None] for axis in axes]
    return conv_factors.fill(made, layer, [inputs.transpose(1, 2), *middle, outputs])


def _alternate(kernel: np.ndarray, rank: int, config: Config) -> list[np.ndarray]:
    """Factors (size, R), one a mode, of one group's kernel (O, I, *taps)."""
    size = float(np.linalg.norm(kernel))
    if not size:
        return [np.zeros((n, rank)) for n in kernel.shape]
    start = _start(kernel / size, rank, config.seed)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        factors = parafac(
            kernel / size,
            rank,
            n_iter_max=config.iterations,
            init=(np.ones(rank), start),
            tol=config.tolerance,
            l2_reg=config.penalty,
        ).factors
    norms = np.array([np.linalg.norm(factor, axis=0) for factor in factors])
    each = (size * norms.prod(0)) ** (1 / len(factors))
    return [factor / np.where(own > 0, own, 1.0) * each for factor, own in zip(factors, norms, strict=True)]


def _start(kernel: np.ndarray, rank: int, seed: int) -> list[np.ndarray]:
    """Normal numbers, which have every direction of every mode with certainty."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(n, rank)) for n in kernel.shape]


def _sizes(layer: Conv) -> list[int]:
    return [*conv_factors.channels(layer), *(layer.kernel_size[a] for a in conv_factors.spatial_axes(layer))]


def _paying(layer: Conv) -> int:
    """The highest rank with fewer parameters than the layer; 0 when there is none."""
    dense = sum(p.numel() for p in layer.parameters())
    one, two = (conv_factors.parameters(layer, "cp", (r,)) for r in (1, 2))
    return max(0, (dense - 1 - (2 * one - two)) // (two - one))


METHOD = ConvolutionRule(
    config=Config,
    full=full,
    ladder=ladder,
    by_rank=by_rank,
    by_energy=by_energy,
    by_evbmf=by_evbmf,
    decompose=decompose,
)
