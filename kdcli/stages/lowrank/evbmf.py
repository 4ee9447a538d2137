"""The rank of a noisy matrix by empirical variational Bayesian matrix factorisation, in closed form.

A matrix V (L, M), L <= M, is read as B A^T plus Gaussian noise of variance s, with a prior on the columns of A
and B whose variances are estimated too. With a = L / M and the singular values g_h of V, component h is kept when

    g_h^2 > M s x_,    x_ = (1 + t) (1 + a / t),    t the root of F(t) + F(t / a) = 0,    F(z) = log(z + 1) / z - 1/2

and s minimises the free energy

    sum_h  y_h - log y_h + [y_h > x_] (log(t(y_h) + 1) + a log(t(y_h) / a + 1) - t(y_h)),    y_h = g_h^2 / (M s)
    t(y) = (y - (1 + a) + sqrt((y - (1 + a))^2 - 4 a)) / 2

Source: Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global Analytic Solution of Fully-observed Variational Bayesian
Matrix Factorization", JMLR 14, the empirical solution and its estimator of the noise; the form in t is that of
Nakajima, Tomioka, Sugiyama, Babacan 2015, "Condition for Perfect Dimensionality Recovery by Variational Bayesian
PCA", JMLR 16.
Differs: all min(L, M) components take part, and the one-dimensional search for s, which may have several
minima, starts from a grid.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

_GRID = 400
# The share of all energy below which singular values of a float32 matrix are rounding and not noise.
_ROUNDING = 1e-13


def rank(matrix: Tensor) -> int:
    """How many components of ``matrix`` (M, N) stand out of its noise, whose variance is estimated.

    Returns:
        At least 1, at most min(M, N). A matrix without noise keeps its numerical rank.
    """
    short, long = sorted(matrix.shape)
    squares = np.linalg.svd(matrix.detach().double().cpu().numpy(), compute_uv=False) ** 2
    found = components(squares, short, long)
    return max(1, found)


def components(squares: np.ndarray, short: int, long: int) -> int:
    """:func:`rank` from the squared singular values (L,), falling, of an (L, M) matrix; may be 0."""
    energy = squares.sum()
    numerical = int((squares > _ROUNDING * energy).sum())
    if numerical < short:  # no noise: its variance would be 0
        return numerical
    return int((squares > long * noise_variance(squares, short, long) * threshold(short / long)).sum())


def threshold(ratio: float) -> float:
    """x_ for a = L / M in (0, 1]: components with g^2 at or below M s x_ are noise."""

    def residual(t: float) -> float:
        return float(np.log1p(t) / t + ratio * np.log1p(t / ratio) / t - 1.0)

    root = brentq(residual, 1e-3 * np.sqrt(ratio), 1e3, xtol=1e-14)
    return (1 + root) * (1 + ratio / root)


def noise_variance(squares: np.ndarray, short: int, long: int) -> float:
    """The variance s that minimises the free energy.

    Args:
        squares: (L,) squared singular values, falling, the last one above 0.
        short: L.
        long: M.
    """
    ratio = short / long
    edge = threshold(ratio)
    most = max(0, min(int(np.ceil(short / (1 + ratio))) - 1, short - 1))
    # The minimum lies between the noise that explains the tail and the one that explains everything.
    least = max(squares[most] / (long * edge), squares[most:].mean() / long)
    highest = squares.mean() / long
    if least >= highest:
        return float(highest)

    def energy(logs: np.ndarray | float) -> np.ndarray:
        y = squares / (long * np.exp(np.atleast_1d(logs))[:, None])
        gap = np.maximum(y, edge) - (1 + ratio)  # beyond the edge the root is real
        t = (gap + np.sqrt(gap**2 - 4 * ratio)) / 2
        kept = np.log1p(t) + ratio * np.log1p(t / ratio) - t
        return (y - np.log(y) + np.where(y > edge, kept, 0.0)).sum(1)

    grid = np.linspace(np.log(least), np.log(highest), _GRID)
    at = int(energy(grid).argmin())
    low, high = grid[max(0, at - 1)], grid[min(_GRID - 1, at + 1)]
    best = minimize_scalar(lambda x: float(energy(x)[0]), bounds=(low, high), method="bounded").x
    return float(np.exp(best))
