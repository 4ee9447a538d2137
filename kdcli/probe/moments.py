"""Statistics of what flows through layers, gathered batch by batch: padding and dead positions do not count.

Letters: N vectors, D features of a vector, E features of its target; O outputs and I inputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean (D,) and covariance (D, D) of vectors that arrive in batches, and how targets (E,) go with them.

    Sums are kept in float64. Batches are centred before their product is taken and joined by the update of
    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances":
    subtracting the mean at the end would lose the small directions next to a large mean, which layer norms
    produce.

    Args:
        size: D.
        device: Where the vectors are.
        targets: E, or 0 when there are none.
    """

    def __init__(self, size: int, device: torch.device, targets: int = 0) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=place)

        self.weight = 0.0
        self.mean, self._scatter = zeros(size), zeros(size, size)
        self.target_mean, self._cross = zeros(targets), zeros(targets, size)

    def add(self, vectors: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Take in (N, D) vectors, where asked for their (N, E) targets, and how much each counts (N,)."""
        share = float(len(vectors) if weights is None else weights.double().sum())
        if not share:
            return
        total = self.weight + share
        joint = self.weight * share / total
        root = None if weights is None else (weights / share).sqrt().float()[:, None]
        centred, shift = self._centre(vectors, self.mean, root)
        self._scatter += (centred.T @ centred).to(self._scatter) * (1.0 if root is None else share)
        self._scatter += torch.outer(shift, shift) * joint
        self.mean += shift * (share / total)
        if targets is not None:
            wanted, drift = self._centre(targets, self.target_mean, root)
            self._cross += (wanted.T @ centred).to(self._cross) * (1.0 if root is None else share)
            self._cross += torch.outer(drift, shift) * joint
            self.target_mean += drift * (share / total)
        self.weight = total

    @staticmethod
    def _centre(vectors: Tensor, so_far: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors less their mean, times the roots of their weights; and how far the mean is from ``so_far``."""
        vectors = vectors.detach().float()
        if root is None:
            mean = vectors.mean(0)
            return vectors - mean, mean.to(so_far) - so_far
        mean = (vectors * root.square()).sum(0)
        return (vectors - mean) * root, mean.to(so_far) - so_far

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by the weight."""
        return self._scatter / (self.weight or 1.0)

    @property
    def cross(self) -> Tensor:
        """Covariance (E, D) of targets and vectors."""
        return self._cross / (self.weight or 1.0)
