"""Sums of a sub-layer's features and of what it should give, from which its output projection is fitted again.

Shape letters: N tokens, U features, D outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.probe import definite


@dataclass
class RawMoments:
    """Second moments of a sub-layer's features h and targets t over real tokens, in float64 on the CPU.

    The sums are of h h^T (U, U), h t^T (U, D), t^T t, h (U,), t (D,) and 1.
    """

    hh: Tensor
    ht: Tensor
    tt: float
    h: Tensor
    t: Tensor
    count: float

    def centred(self) -> tuple[Tensor, Tensor, float]:
        """Covariance of h (U, U), of h with t (U, D), and the summed variance of t."""
        h, t = self.h / self.count, self.t / self.count
        spread = self.tt / self.count - float(t @ t)
        return self.hh / self.count - torch.outer(h, h), self.ht / self.count - torch.outer(h, t), spread

    def scale(self) -> float:
        """The mean variance of the features, see :func:`kdcli.probe.definite.scale_of`."""
        return definite.scale_of(self.centred()[0], self.h / self.count)

    def through(self, first: Tensor) -> RawMoments:
        """The moments of the features ``first`` h, (R, U)."""
        return RawMoments(
            first @ self.hh @ first.T, first @ self.ht, self.tt, first @ self.h, self.t, self.count
        )


def add(sums: RawMoments | None, h: Tensor, t: Tensor, root: Tensor) -> RawMoments:
    """Add the weighted tokens h (N, U) and t (N, D); products in float32, sums in float64.

    Products are taken of what is left without the batch's mean: next to a large mean float32 would lose what varies.
    """

    def lift(x: Tensor) -> Tensor:
        return x.cpu().double()

    count = float(lift(root).square().sum())
    least = count or 1.0
    centre_h, centre_t = (
        h.T @ root / least,
        t.T @ root / least,
    )  # (U, 1) and (D, 1), rounded: any centre will do
    own_h, own_t = h - root @ centre_h.T, t - root @ centre_t.T
    c, d = lift(centre_h)[:, 0], lift(centre_t)[:, 0]
    over_h, over_t = lift(own_h.T @ root)[:, 0], lift(own_t.T @ root)[:, 0]
    parts = (
        lift(own_h.T @ own_h) + torch.outer(c, over_h) + torch.outer(over_h + count * c, c),
        lift(own_h.T @ own_t) + torch.outer(c, over_t) + torch.outer(over_h + count * c, d),
        float(lift(own_t).square().sum() + 2 * (d @ over_t) + count * (d @ d)),
    )
    firsts = (over_h + count * c, over_t + count * d, count)
    if sums is None:
        return RawMoments(*parts, *firsts)
    return RawMoments(
        sums.hh + parts[0],
        sums.ht + parts[1],
        sums.tt + parts[2],
        sums.h + firsts[0],
        sums.t + firsts[1],
        sums.count + firsts[2],
    )
