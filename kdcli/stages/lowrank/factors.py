"""The one problem that every factorisation of a matrix solves, and its solution for all ranks at once.

A linear layer y = W x + b, W (O, I), is written W = P Q through its narrow side of m = min(O, I) features:
P = 1, Q = W where it has fewer outputs, P = W, Q = 1 where it has more. Every method of ``rules/``
looks for the m x m matrix N of rank r, W' = P N Q, that minimises

    tr( M (1 - N) K (1 - N)^T )

and differs only in M, which says how much an error in each direction hurts, and K, which says how much flows
there. With M = R^T R (Cholesky) and U_r the r leading eigenvectors of R K R^T the solution is

    N = R^-1 U_r U_r^T R,

so the factors are P R^-1 U_r and U_r^T R Q: one symmetric eigenproblem of the narrow size, one triangular
solve, and nothing is inverted. At r = m the product is W again, whatever M and K are; a singular K, as
activations after GELU give, is no special case. The minimum is the sum of the eigenvalues beyond the r-th.

Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.models import mapped
from kdcli.probe import definite
from kdcli.probe.moments import Moments

# Share of the mean of a metric's diagonal that is added to it, so that it has a Cholesky factor.
_FLOOR = 1e-7
# Of the energy: how much plain size of W decides where the rest does not.
_TIE = 1e-9


def narrow_by_outputs(layer: nn.Linear | nn.Embedding) -> bool:
    """Whether the narrow side are the outputs: their statistics describe the layer with the smaller matrix.

    An embedding table is the matrix that maps one-hot tokens to features: O features, I tokens.
    """
    return isinstance(layer, nn.Embedding) or layer.out_features < layer.in_features


def narrow_size(layer: nn.Linear | nn.Embedding) -> int:
    """m, the features of the narrow side; of a table always its outputs, also where it has fewer tokens."""
    return layer.embedding_dim if isinstance(layer, nn.Embedding) else min(layer.weight.shape)


@dataclass(frozen=True)
class Problem:
    """A layer and what is known about it, all float64 on one device; m = min(O, I), u = Q x.

    ``left`` P (O, m), ``right`` Q (m, I). ``mean`` (m,) and ``covariance`` (m, m) of u over real tokens; where no
    bias takes the mean it is zero, and the covariance is not centred. ``spread`` is the variance of the outputs
    (about the origin without a bias), ``output`` (O,) their mean. ``magnitude`` (I,) is the mean |x|.
    ``sensitivity`` (m, m) is P^T G P with G the Gauss-Newton matrix of the divergence for this layer's outputs,
    in nats a row. ``fisher`` are the sums of the squared gradients of
    the weights over every row (O,) and every column (I,) of W.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    mean: Tensor
    covariance: Tensor
    spread: float
    output: Tensor
    magnitude: Tensor | None = None
    sensitivity: Tensor | None = None
    fisher: tuple[Tensor, Tensor] | None = None

    @cached_property
    def plain(self) -> Tensor:
        """P^T P (m, m): every output counts the same."""
        return self.left.T @ self.left

    @cached_property
    def white(self) -> Tensor:
        """Q Q^T (m, m): what flows when all inputs are independent and alike."""
        return self.right @ self.right.T


@torch.no_grad()
def problem_of(
    layer: nn.Linear | nn.Embedding,
    moments: Moments,
    *,
    centred: bool = True,
    magnitude: Tensor | None = None,
    sensitivity: Tensor | None = None,
    fisher: tuple[Tensor, Tensor] | None = None,
) -> Problem:
    """Make the problem of one layer.

    Args:
        layer: With weight (O, I), or a table (I, O), whose factors have a bias.
        moments: Of its inputs x (I,), or where its outputs are the narrow side of W x (O,).
        centred: Whether the bias takes the mean of what is dropped.
        magnitude: Mean |x| (I,).
        sensitivity: P^T G P (m, m).
        fisher: Sums (O,) and (I,) of squared gradients.
    """
    place = moments.mean.device
    weight = layer.weight.detach().to(place, torch.float64)
    bias: Tensor | None
    if isinstance(layer, nn.Embedding):
        weight = weight.T
        bias = torch.zeros(len(weight), dtype=torch.float64, device=place)
    else:
        bias = None if layer.bias is None else layer.bias.detach().to(place, torch.float64)
    one = torch.eye(narrow_size(layer), dtype=torch.float64, device=place)
    left, right = (one, weight) if narrow_by_outputs(layer) else (weight, one)
    mean, covariance = moments.mean, moments.covariance
    output = left @ mean
    second = covariance + torch.outer(mean, mean)
    spread = float(((left.T @ left) * (second if bias is None else covariance)).sum())
    output = torch.zeros_like(output) if bias is None else output + bias
    if bias is None or not centred:  # the mean has to be approximated like everything else
        mean, covariance = torch.zeros_like(mean), second
    known = [None if t is None else t.to(place, torch.float64) for t in (magnitude, sensitivity)]
    sums = None if fisher is None else (fisher[0].to(left), fisher[1].to(left))
    return Problem(left, right, bias, mean, covariance, spread, output, known[0], known[1], sums)


@dataclass(frozen=True)
class Factors:
    """Factor pairs of all ranks up to K, the leading ones of each.

    ``left`` (O, K) and ``right`` (K, I) float32, W' = left[:, :r] @ right[:r]. ``bias`` (O,) holds at full rank;
    ``mean`` (K,) is that of right x and ``centre`` (O,) that of W x, as far as the bias takes it: what the dropped
    directions lose of it goes there. ``output`` (O,) is the mean output of the layer. ``energies`` (m,) is the
    method's own loss of every direction, falling; ``errors`` (m + 1,) the squared output error at every rank by
    the variance of the outputs, on the inputs that were seen; ``damage`` (m + 1,) the predicted divergence in
    nats a row, where the sensitivity is known.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    centre: Tensor
    mean: Tensor
    output: Tensor
    energies: np.ndarray
    errors: np.ndarray
    damage: np.ndarray | None

    def rank(self, energy: float) -> int:
        """The lowest rank that keeps this share of the energy."""
        kept = np.cumsum(self.energies)
        return min(len(kept), int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1)


@torch.no_grad()
def solve(
    problem: Problem, metric: Tensor, flow: Tensor, *, largest: int | None = None, curves: bool = True
) -> Factors:
    """Solve the problem of the module for all ranks.

    Args:
        problem: The layer.
        metric: M (m, m).
        flow: K (m, m).
        largest: No factors beyond this rank are kept.
        curves: Whether ``errors`` and ``damage`` are wanted; without them they are empty.
    """
    root = _root(metric)
    # Of directions in which nothing flows the largest of W come first.
    energy, plain = float((metric * flow).sum()), float((metric * problem.white).sum())
    tied = flow + problem.white * (_TIE * (energy or 1.0) / plain if plain > 0 else 0.0)
    inner = root @ tied @ root.T
    energies, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    # LAPACK's signs depend on where a matrix lies in memory: the largest component of each is made positive.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = vectors.flip(1)
    energies = energies.flip(0).clamp(min=0)
    a = torch.linalg.solve_triangular(root, vectors, upper=True)
    b = vectors.T @ root
    kept = len(metric) if largest is None else min(len(metric), max(1, largest))
    errors, damage = torch.zeros(0), None
    if curves:
        moved = energies if flow is problem.covariance else b @ problem.covariance @ b.T
        errors = _tails(problem.plain, moved, a) / (problem.spread or 1.0)
        if problem.sensitivity is not None:
            damage = _tails(problem.sensitivity, moved, a).cpu().numpy() / 2
    # float32 is what the factors are stored in, so their products need no more.
    left = problem.left.float() @ a[:, :kept].float()
    right = b[:kept].float() @ problem.right.float()
    # What flows between the factors gets an even scale: the square root of the singular values on both sides.
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(1e-12, 1e12).sqrt()
    return Factors(
        left=left * balance,
        right=right / balance[:, None],
        bias=problem.bias,
        centre=problem.left @ problem.mean,
        mean=(b[:kept] @ problem.mean) / balance,
        output=problem.output,
        energies=energies.cpu().numpy(),
        errors=errors.cpu().numpy(),
        damage=damage,
    )


def in_file(factors: Factors) -> Factors:
    """The same factors, in a file if they are in main memory."""
    if factors.left.device.type != "cpu":
        return factors
    pair = factors.left, factors.right
    left, right = mapped.empty([(t.shape, t.dtype) for t in pair])
    return replace(factors, left=left.copy_(pair[0]), right=right.copy_(pair[1]))


def _root(metric: Tensor) -> Tensor:
    """R (m, m), upper triangular, R^T R = metric with a floor under it."""
    one = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    mean = float(metric.diagonal().mean())
    floor = _FLOOR * mean if mean > 0 else 1.0
    for _ in range(8):
        found, failed = torch.linalg.cholesky_ex((metric + metric.T) / 2 + floor * one, upper=True)
        if not int(failed):
            return found
        floor *= 10
    return one * max(mean, 1e-30) ** 0.5


def _tails(metric: Tensor, moved: Tensor, a: Tensor) -> Tensor:
    """tr(metric D flow D^T) with D the sum of the directions a_k b_k^T from the r-th on, for r = 0 ... m.

    ``moved`` is b flow b^T (m, m), or its diagonal (m,) when nothing is beside it.
    """
    if moved.ndim == 1:
        h = (a * (metric @ a)).sum(0) * moved
        tails = h.flip(0).cumsum(0).flip(0)
    else:
        h = (a.T @ metric @ a) * moved
        tails = h.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    tails = torch.cat([tails, tails.new_zeros(1)]).clamp(min=0)
    return tails.flip(0).cummax(0).values.flip(0)  # rounding must not make a higher rank look worse


@torch.no_grad()
def fill(pair: nn.Module, factors: Factors, rank: int) -> None:
    """Copy the leading ``rank`` directions into a :class:`kdcli.families.modules.LowRankLinear` of that rank."""
    left, right = factors.left[:, :rank], factors.right[:rank]
    pair.first.weight.copy_(right)  # type: ignore[union-attr, operator]
    pair.second.weight.copy_(left)  # type: ignore[union-attr, operator]
    if factors.bias is not None:  # the float64 sum is rounded once
        moved = factors.centre - left.double() @ factors.mean[:rank]
        pair.second.bias.copy_(factors.bias + moved)  # type: ignore[union-attr, operator]


def refit(problem: Problem, moments: Moments, *, ridge: float) -> Problem:
    """The problem of giving the dense model's outputs on other inputs than the dense model's.

    The best linear map from u (m,) to the targets is, with a ridge that holds it to the layer's own weights,

        T = P + (E[y u^T] - P C) (C + ridge * mean(diag C))^-1

    and takes the place of P. Where the outputs are the narrow side, T (O, O) is applied to W from the left.

    Args:
        problem: Of the dense layer.
        moments: Of u on the inputs of the compressed model, with the dense model's outputs as targets (O,).
        ridge: In units of the mean variance of u.
    """
    covariance, mean = moments.covariance, moments.mean
    cross = moments.cross
    if problem.bias is None:
        covariance = covariance + torch.outer(mean, mean)
        cross = cross + torch.outer(moments.target_mean, mean)
        mean = torch.zeros_like(mean)
    one = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    root = _root(covariance + ridge * definite.scale_of(moments.covariance, moments.mean) * one)
    wanted = cross - problem.left @ covariance
    target = problem.left + torch.cholesky_solve(wanted.T, root, upper=True).T
    sensitivity = problem.sensitivity
    if problem.left.shape[0] == problem.left.shape[1] and problem.right.shape[0] != problem.right.shape[1]:
        # u = W x: the map is taken into Q, and the directions are those of T u.
        right, left = target @ problem.right, problem.left
        covariance, mean = target @ covariance @ target.T, target @ mean
    else:
        right, left = problem.right, target
        if sensitivity is not None:  # known for P alone: T = P X up to what P does not reach
            # Not by lstsq: what LAPACK's solver for dependent columns gives depends on where they lie in memory.
            x = definite.solve(problem.plain, problem.left.T @ target)
            sensitivity = x.T @ sensitivity @ x
    # The mean output is the targets' own: centre + bias = target mean.
    bias = None if problem.bias is None else moments.target_mean - left @ mean
    return replace(
        problem,
        left=left,
        right=right,
        bias=bias,
        mean=mean,
        covariance=covariance,
        sensitivity=sensitivity,
    )
