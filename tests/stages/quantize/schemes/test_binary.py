"""Binary weights against the closed form, which no other choice of sign and scale beats."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdcli.stages.quantize.schemes import binary, ternary
from kdcli.stages.quantize.schemes.binary import Config, quantise


def weight(seed: int = 0) -> torch.Tensor:
    made = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
    made[1] = 0
    made[2, 3] = 0
    return made * torch.logspace(-2, 1, 6)[:, None]


@pytest.mark.parametrize("scale", ["row", "matrix"])
def test_signs_and_scales_by_hand(scale: str) -> None:
    w = weight()
    found = quantise(w, Config(scale=scale))
    assert (found.bits, found.scale.shape) == (1, (6, 1))
    assert set(found.values.unique().tolist()) == {-1, 1}
    for row, codes, a in zip(w.tolist(), found.values.tolist(), found.scale.flatten().tolist(), strict=True):
        assert codes == [1 if v >= 0 else -1 for v in row]
        every = row if scale == "row" else w.flatten().tolist()
        assert a == pytest.approx(sum(abs(v) for v in every) / len(every), rel=1e-5)  # float32 sums
    if scale == "row":
        assert (found.dense()[1] == 0).all()


def test_nothing_of_one_bit_is_nearer() -> None:
    w = torch.randn(1, 7, generator=torch.Generator().manual_seed(1))
    best = float(((w - quantise(w, Config()).dense()) ** 2).sum())
    for signs in itertools.product((-1.0, 1.0), repeat=7):
        for factor in (0.8, 1.0, 1.2):
            other = torch.tensor([signs]) * float(w.abs().mean()) * factor
            assert float(((w - other) ** 2).sum()) >= best - 1e-6


def test_a_scale_a_row_is_never_worse_than_one_for_all() -> None:
    w = weight(2)
    by_row, whole = (quantise(w, Config(scale=s)).dense() for s in ("row", "matrix"))
    assert float(((w - by_row) ** 2).sum()) < float(((w - whole) ** 2).sum())


def test_tables_are_ternary() -> None:
    w = weight(3)
    found, theirs = quantise(w, Config(), table=True), ternary.quantise(w, ternary.Config(), table=True)
    assert found.bits == theirs.bits == 2
    assert torch.equal(found.dense(), theirs.dense())
    assert binary.BITS == 1
