"""GPTQ against the elimination that its Cholesky factor stands for, and against rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.quantize.rounding import gptq, rtn
from kdcli.stages.quantize.rounding.gptq import Config


def layer(seed: int = 0, rows: int = 12, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs (N, I) that depend on each other, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(20, columns, generator=generator)
    inputs = torch.randn(300, 20, generator=generator) @ mixing
    return weight, inputs + 0.3 * torch.randn(300, columns, generator=generator)


def by_elimination(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
    damp: float,
    order: list,
) -> np.ndarray:
    """Round column after column in ``order``; each error is spread by the inverse Hessian of what is left.

    That inverse is computed anew for every column (Frantar and Alistarh 2022, "Optimal Brain Compression",
    equation 3), which needs no Cholesky factor.
    """
    w = weight.copy()
    columns = w.shape[1]
    h = hessian + damp * np.diag(hessian).mean() * np.eye(columns)
    group = columns // scale.shape[1]
    values = np.zeros_like(w)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    left = list(order)
    for j in order:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        at = left.index(j)
        s, z = scale[:, j // group], zero[:, j // group]
        values[:, j] = np.clip(np.round(w[:, j] / s) + z, bottom, top)
        error = (w[:, j] - (values[:, j] - z) * s) / inverse[at, at]
        w[:, left] -= error[:, None] * inverse[at][None, :]
        left.remove(j)
    return values


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("block", [1, 24, 128])
def test_it_is_the_elimination(order: bool, block: int) -> None:
    weight, inputs = layer()
    hessian = inputs.T @ inputs
    made = gptq.quantise(weight, hessian, 4, None, Config(order=order, block=block))
    assert made.zero is not None
    columns = list(range(64))
    if order:
        columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    arrays = [t.double().numpy() for t in (weight, hessian, made.scale, made.zero)]
    want = by_elimination(*arrays, 4, 0.01, columns)
    # Errors of float32 accumulate over 64 columns; a few quotients near a half fall on the other side.
    assert (made.values.numpy() == want).mean() > 0.98
    assert np.abs(made.values.numpy() - want).max() <= 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 16])
def test_inputs_that_are_independent_leave_rounding_to_the_nearest(
    group: int | None, symmetric: bool
) -> None:
    weight, _ = layer()
    plain = (rtn.symmetric if symmetric else rtn.asymmetric)(weight, 4, group=group)
    for order in (True, False):
        made = gptq.quantise(weight, torch.eye(64), 4, group, Config(order=order), symmetric=symmetric)
        assert torch.equal(made.values, plain.values)
        assert torch.equal(made.scale, plain.scale)
        assert (made.zero is None) == symmetric


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 16), (4, None), (2, 16)])
def test_the_error_of_the_output_is_well_below_that_of_the_nearest(
    bits: int, group: int | None, order: bool
) -> None:
    weight, inputs = layer(bits)
    plain = rtn.asymmetric(weight, bits, group=group).dense()
    made = gptq.quantise(weight, inputs.T @ inputs, bits, group, Config(order=order)).dense()

    def error(dense: torch.Tensor) -> float:
        return float((inputs @ (weight - dense).T).pow(2).sum())

    assert error(made) < 0.7 * error(plain)


@pytest.mark.parametrize("block", [16, 24, 128])
def test_blocks_change_speed_and_nothing_else(block: int) -> None:
    weight, inputs = layer(5)
    hessian = inputs.T @ inputs
    for order in (True, False):
        first = gptq.quantise(weight, hessian, 4, 32, Config(block=64, order=order))
        second = gptq.quantise(weight, hessian, 4, 32, Config(block=block, order=order))
        assert (first.values == second.values).float().mean() > 0.99
        torch.testing.assert_close(first.scale, second.scale, rtol=1e-3, atol=0)


def test_features_that_never_occur_cost_nothing_and_break_nothing() -> None:
    weight, inputs = layer()
    inputs[:, 7] = 0
    made = gptq.quantise(weight, inputs.T @ inputs, 4, None, Config())
    assert bool((made.dense()[:, 7] == 0).all())
    none = gptq.quantise(weight, torch.zeros(64, 64), 4, None, Config())
    assert torch.equal(none.values, rtn.asymmetric(weight, 4).values)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_zeros_stay_and_their_error_goes_to_the_others(order: bool, symmetric: bool) -> None:
    weight, inputs = layer()
    weight[:, ::2] = 0
    hessian = inputs.T @ inputs
    made = gptq.quantise(weight, hessian, 4, 16, Config(order=order), symmetric=symmetric)
    assert bool((made.dense()[:, ::2] == 0).all())
    plain = (rtn.symmetric if symmetric else rtn.asymmetric)(weight, 4, group=16)
    losses = [float(((q.dense() - weight) @ inputs.T).square().sum()) for q in (made, plain)]
    assert losses[0] < 0.8 * losses[1]
