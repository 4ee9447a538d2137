r"""Tucker-2: a convolution between fewer channels, with a 1x1 convolution before and after it.

For a kernel $K$ (O, I, k) with $k$ taps in all, and ranks $A$ of the inputs and $B$ of the outputs:

    K_{oit} \approx \sum_{a,b} U_{ob}\, C_{bat}\, V_{ia} \qquad C = K \times_0 U^\top \times_1 V^\top

with orthonormal columns in $U$ (O, B) and $V$ (I, A). They start as the leading left singular vectors of the
unfoldings of $K$ by outputs and by inputs, for which $\lVert K - K' \rVert^2$ is at most the sum of the squared
singular values that both drop; higher-order orthogonal iteration then lowers the error further. $A = I$ or $B = O$
leaves that factor out (Tucker-1), where the truncated SVD of the other unfolding is the optimum. A 1x1 kernel is a
matrix: $A = B$, by its SVD.

Source: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", ICLR, arXiv:1511.06530, section 3.1; the iteration and the bound from De Lathauwer, De Moor and
Vandewalle 2000, SIAM J. Matrix Anal. Appl. 21(4).
Differs: each group of channels is factorised on its own with the same ranks; the paper has no groups. The iteration
is tensorly's ``partial_tucker``, in float64. It divides by the norm of the kernel and asks for more singular vectors
than there are when a rank exceeds the taps times the other rank, so kernels of zeros and such ranks keep the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorly
import torch
from pydantic import BaseModel, ConfigDict, Field
from tensorly.decomposition import partial_tucker
from torch import Tensor

from kdcli.models import conv_factors
from kdcli.models.conv_factors import Conv, FactorisedConv
from kdcli.stages.lowrank import evbmf, rank_ladder
from kdcli.stages.lowrank.rule import ConvolutionRule, ConvRanks

_CANDIDATES = 40  # ranks of a mode that a ladder looks at


class Config(BaseModel):
    """Parameters of the Tucker-2 factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    iterations: int = Field(
        default=50, ge=0, description="most rounds of orthogonal iteration; 0 keeps the start"
    )
    tolerance: float = Field(
        default=1e-6,
        gt=0,
        allow_inf_nan=False,
        description="stop when the relative error falls by less than this",
    )


@dataclass(frozen=True)
class _Modes:
    """``outputs`` (G, O, B) and ``inputs`` (G, I, A): singular vectors; ``kept`` (B, A): energy at those ranks."""

    outputs: Tensor
    inputs: Tensor
    kept: np.ndarray


def full(layer: Conv) -> ConvRanks:
    """ConvRanks at which the layer is reproduced exactly."""
    outputs, inputs = conv_factors.channels(layer)
    taps = int(np.prod(layer.kernel_size))
    return min(inputs, outputs * taps), min(outputs, inputs * taps)


def ladder(layer: Conv) -> list[ConvRanks]:
    """ConvRanks of rising cost and falling error, each the best that the start offers for its parameters."""
    dense = sum(p.numel() for p in layer.parameters())
    kept = _modes(layer).kept
    (outputs, inputs), (b_most, a_most) = conv_factors.channels(layer), kept.shape
    choices = [
        (a, b)
        for a in sorted({*_some(a_most), inputs})
        for b in sorted({*_some(b_most), outputs})
        if _clip(layer, a, b) == (a, b)
    ]
    cost = np.array([conv_factors.parameters(layer, "tucker2", choice) for choice in choices])
    energy = np.array([kept[min(b, b_most) - 1, min(a, a_most) - 1] for a, b in choices])
    found: list[int] = []
    best = -1.0
    # By cost, then by energy: what keeps no more than something cheaper is no step.
    for i in np.lexsort((-energy, cost)).tolist():
        if cost[i] < dense and energy[i] > best:
            best = energy[i]
            found.append(i)
    return [choices[found[i]] for i in rank_ladder.spread(cost[found])]


def by_rank(layer: Conv, rank: int) -> ConvRanks:
    """``rank`` in both modes, where they have as many."""
    return _clip(layer, rank, rank)


def by_energy(layer: Conv, energy: float) -> ConvRanks:
    """The ranks with the fewest parameters among those whose kernel keeps this share of the squared weights."""
    kept = _modes(layer).kept
    outputs, inputs = conv_factors.channels(layer)
    enough = kept >= energy * kept[-1, -1] * (1 - 1e-12)
    choices = []
    for a in (*range(1, kept.shape[1] + 1), inputs):
        column = enough[:, min(a, kept.shape[1]) - 1]
        if column[-1]:
            choices += [_clip(layer, a, int(column.argmax()) + 1), _clip(layer, a, outputs)]
    return min(choices, key=lambda ranks: conv_factors.parameters(layer, "tucker2", ranks))


def by_evbmf(layer: Conv) -> ConvRanks:
    """What variational Bayes finds above the noise in each unfolding, the most of any group."""
    kernels = conv_factors.kernels(layer)
    outputs = max(evbmf.rank(kernel.flatten(1)) for kernel in kernels)
    inputs = max(evbmf.rank(kernel.transpose(0, 1).flatten(1)) for kernel in kernels)
    return _clip(layer, inputs, outputs)


@torch.no_grad()
def decompose(layer: Conv, ranks: ConvRanks, config: Config) -> FactorisedConv:
    """The factors of least squared error in the kernel that the iteration finds.

    Args:
        layer: Its kernel is (O, I/G, *k).
        ranks: (A, B) of each group.
        config: How long to iterate.

    Returns:
        The chain of convolutions, as :func:`kdcli.models.conv_factors.build` makes it.

    Raises:
        InputError: The layer or the ranks do not fit; see there.
    """
    made = conv_factors.build(layer, "tucker2", ranks)
    kernels = conv_factors.kernels(layer)
    if not conv_factors.spatial_axes(layer):
        u, s, vt = torch.linalg.svd(kernels, full_matrices=False)
        root = s[:, : ranks[0]].sqrt()  # shared by the two factors
        first, second = root[:, :, None] * vt[:, : ranks[0]], u[:, :, : ranks[0]] * root[:, None]
        return conv_factors.fill(made, layer, [first, second])
    modes = _modes(layer)
    found = [
        _iterate(kernel, _columns(v, ranks[0]), _columns(u, ranks[1]), config)
        for kernel, v, u in zip(kernels, modes.inputs, modes.outputs, strict=True)
    ]
    core, inputs, outputs = (torch.stack(part) for part in zip(*found, strict=True))
    return conv_factors.fill(made, layer, [inputs.transpose(1, 2), core, outputs])


def _iterate(
    kernel: Tensor, inputs: Tensor, outputs: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Core (B, A, *taps) and both factors, (I, A) and (O, B), of one group."""
    flat = kernel.flatten(2)
    (o, b), (i, a), taps = outputs.shape, inputs.shape, flat.shape[2]
    if b == o:
        outputs = torch.eye(o, dtype=kernel.dtype)
    if a == i:
        inputs = torch.eye(i, dtype=kernel.dtype)
    sound = a < i and b < o and a <= b * taps and b <= a * taps and bool(flat.any())
    if sound and config.iterations:
        start = torch.einsum("oit,ob,ia->bat", flat, outputs, inputs)
        with tensorly.backend_context("numpy", local_threadsafe=True):
            (_, factors), _ = partial_tucker(
                flat.numpy(),
                rank=[b, a],
                modes=[0, 1],
                n_iter_max=config.iterations,
                init=(start.numpy(), [outputs.numpy(), inputs.numpy()]),
                tol=config.tolerance,
            )
        outputs, inputs = (torch.from_numpy(np.ascontiguousarray(factor)) for factor in factors)
    core = torch.einsum("oit,ob,ia->bat", flat, outputs, inputs)
    return core.reshape(b, a, *kernel.shape[2:]), inputs, outputs


def _modes(layer: Conv) -> _Modes:
    kernels = conv_factors.kernels(layer)
    kernels = kernels.reshape(*kernels.shape[:3], -1)
    outputs = _leading(kernels.flatten(2))
    inputs = _leading(kernels.transpose(1, 2).flatten(2))
    core = torch.einsum("goit,gob,gia->gbat", kernels, outputs, inputs)
    kept = core.square().sum((0, 3)).cumsum(0).cumsum(1)
    return _Modes(outputs, inputs, kept.numpy())


def _leading(matrices: Tensor) -> Tensor:
    """Left singular vectors (G, M, min(M, N)) of (G, M, N), the largest singular value first.

    As eigenvectors of the products of rows, which is faster where N is large. What that cannot tell apart has less
    than 1e-15 of the energy, and the vectors are orthonormal all the same.
    """
    vectors = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(2)
    return vectors[..., : min(matrices.shape[1:])]


def _columns(vectors: Tensor, count: int) -> Tensor:
    """The first columns; zeros where there are fewer, which only a rank beyond :func:`full` asks for."""
    return torch.nn.functional.pad(vectors, (0, max(0, count - vectors.shape[1])))[:, :count]


def _clip(layer: Conv, a: int, b: int) -> ConvRanks:
    """The nearest ranks that the layer has, and neither more than the other and the taps can use.

    All channels of a side are left as they are: that side then has no factor.
    """
    outputs, inputs = conv_factors.channels(layer)
    taps = int(np.prod(layer.kernel_size))
    if taps == 1:
        return (min(a, b, inputs, outputs),) * 2
    a, b = min(a, inputs), min(b, outputs)
    if b < outputs:
        b = min(b, a * taps)
    if a < inputs:
        a = min(a, b * taps)
    return a, b


def _some(most: int) -> list[int]:
    """Up to :data:`_CANDIDATES` ranks from 1 to ``most``, dense where ranks are small."""
    return sorted(
        {round(r) for r in np.geomspace(1, most, _CANDIDATES)}
        | {*np.linspace(1, most, 20, dtype=int).tolist()}
    )


METHOD = ConvolutionRule(
    config=Config,
    full=full,
    ladder=ladder,
    by_rank=by_rank,
    by_energy=by_energy,
    by_evbmf=by_evbmf,
    decompose=decompose,
)
