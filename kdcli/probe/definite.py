"""Systems with covariances that say nothing in some directions: dead and constant features, copies, few rows.

Such a matrix is positive semidefinite on paper and, by rounding, often indefinite in the computer, where a plain
Cholesky factorisation fails. Two rules keep what cannot be known from deciding anything.

1. Ridges are shares of a scale that never falls below what float32 can tell: the variance of numbers of mean
   square q is known to about ``ROUNDING`` q, the unit roundoff of float32 (2^-23; Higham 2002, "Accuracy and
   Stability of Numerical Algorithms", 2nd ed., section 2.2, and 1.9 for the variance). Without that floor a layer
   of constant features would be fitted to its own rounding errors.
2. Where a factorisation still fails, eigenvalues below n eps times the largest are raised to that: it is the error
   bound of a computed eigenvalue (Golub and Van Loan 2013, "Matrix Computations", 4th ed., section 8.1), and the
   tolerance that numpy.linalg.matrix_rank and MATLAB's pinv use.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 2.0**-23


def scale_of(covariance: Tensor, mean: Tensor) -> float:
    """The mean variance of features (U,), at least what rounding leaves of it; positive.

    Args:
        covariance: (U, U).
        mean: (U,), zeros where the covariance is not centred.
    """
    if not len(mean):
        return 1e-30
    variances = covariance.diagonal()
    square = (variances.clamp(min=0) + mean.to(variances).square()).mean()
    return max(float(variances.mean()), ROUNDING * float(square), 1e-30)


def cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """The Cholesky factor of a symmetric matrix (n, n), by the second rule where it has none.

    Args:
        matrix: Its symmetric part is taken.
        upper: R with R^T R = matrix instead of L with L L^T = matrix.
    """
    symmetric = (matrix + matrix.T) / 2
    found, failed = torch.linalg.cholesky_ex(symmetric, upper=upper)
    if not int(failed):
        return found
    values, vectors = torch.linalg.eigh(symmetric)
    info = torch.finfo(matrix.dtype)
    least = max(float(values.abs().max()) * len(values) * info.eps, info.tiny)
    # matrix = B^T B with B = sqrt(values) V^T, and B = Q R: no square is formed again, so this cannot fail.
    root = torch.linalg.qr(values.clamp(min=least).sqrt()[:, None] * vectors.T).R
    root = root * torch.where(root.diagonal() < 0, -1.0, 1.0).to(root)[:, None]
    return root if upper else root.T.contiguous()


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """X (n, k) with matrix X = right, (n, k) or (n,), for a symmetric matrix that should be positive definite."""
    vector = right.ndim == 1
    found = torch.cholesky_solve(right[:, None] if vector else right, cholesky(matrix))
    return found[:, 0] if vector else found


def inverse(matrix: Tensor) -> Tensor:
    """The inverse (n, n) of a symmetric matrix that should be positive definite."""
    return torch.cholesky_inverse(cholesky(matrix))
