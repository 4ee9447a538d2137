"""SparseGPT against Optimal Brain Surgeon with explicit inverses, its limits, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.prune.criteria import magnitude, sparsegpt
from kdcli.stages.prune.criteria.sparsegpt import Config
from kdcli.stages.prune.criterion import Pattern
from tests import tiny
from tests.stages.prune.criteria.jobs import padded, singly, weight_job

EXACT = Config(damping=0.0)


def problem(outputs: int = 6, inputs: int = 24, seed: int = 0, tokens: int = 400):
    """Weights (O, I) and correlated inputs (N, I)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def error(x: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> float:
    return float((x @ (weight - pruned).T).square().mean())


def naive(weight: np.ndarray, hessian: np.ndarray, pattern: Pattern, block: int) -> np.ndarray:
    """The paper's algorithm with one explicit inverse a column instead of a factorisation, row by row."""
    weight, width = weight.copy(), weight.shape[1]
    inverse = [np.linalg.inv(hessian[j:, j:]) for j in range(width)]
    gone = np.zeros(weight.shape, dtype=bool)
    done = 0
    for j in range(width):
        if not pattern.m and j % block == 0:
            end = min(j + block, width)
            cost = weight[:, j:end] ** 2 / np.array([inverse[k][0, 0] for k in range(j, end)])
            lose = round(pattern.sparsity * weight.shape[0] * end) - done
            done += lose
            gone[:, j:end].flat = np.argsort(np.argsort(cost.ravel())) < lose
        if pattern.m and j % pattern.m == 0 and j + pattern.m <= width:
            for i in range(len(weight)):
                cost = [weight[i, k] ** 2 / inverse[k][0, 0] for k in range(j, j + pattern.m)]
                gone[i, j + np.argsort(cost)[: pattern.m - pattern.n]] = True
        for i in np.flatnonzero(gone[:, j]):
            weight[i, j:] -= weight[i, j] / inverse[j][0, 0] * inverse[j][:, 0]
            weight[i, j] = 0
    return weight


@pytest.mark.parametrize("block", [1, 7, 8, 128])
@pytest.mark.parametrize("pattern", [Pattern(0.3), Pattern(0.5), Pattern(0.9)])
def test_shares_are_what_explicit_inverses_give(pattern: Pattern, block: int) -> None:
    weight, x = problem()
    found, kept = sparsegpt.solve(weight, moment(x), pattern, Config(damping=0.0, block=block))
    expected = naive(weight.numpy(), 2 * moment(x).numpy(), pattern, block)
    # Float64, and a Hessian whose condition number is about 1e4.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(found != 0, kept)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (4, 8)])
@pytest.mark.parametrize("block", [8, 128])
def test_n_of_m_is_what_explicit_inverses_give(n: int, m: int, block: int) -> None:
    weight, x = problem()
    found, kept = sparsegpt.solve(
        weight, moment(x), Pattern(1 - n / m, n, m), Config(damping=0.0, block=block)
    )
    expected = naive(weight.numpy(), 2 * moment(x).numpy(), Pattern(1 - n / m, n, m), block)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    whole = 24 // m * m
    assert (kept[:, :whole].unflatten(1, (-1, m)).sum(-1) == n).all()
    assert kept[:, whole:].all()


def test_when_the_first_columns_go_the_rest_is_the_least_squares_optimum() -> None:
    weight, x = problem()
    weight[:, :8] *= 1e-6
    found, kept = sparsegpt.solve(weight, moment(x), Pattern(8 / 24), EXACT)
    assert not kept[:, :8].any()
    expected = torch.linalg.lstsq(x[:, 8:], x @ weight.T).solution.T
    torch.testing.assert_close(found[:, 8:], expected, rtol=1e-7, atol=1e-10)


def test_uncorrelated_inputs_of_one_size_make_it_magnitude_without_corrections() -> None:
    weight, _ = problem()
    found, kept = sparsegpt.solve(weight, torch.eye(24, dtype=torch.float64), Pattern(0.5), Config())
    by_size = magnitude.masks({"w": weight}, Pattern(0.5), magnitude.Config())["w"]
    assert torch.equal(kept, by_size)
    torch.testing.assert_close(found, weight * by_size, rtol=0, atol=1e-15)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.8), Pattern(0.5, 2, 4)])
def test_the_output_suffers_less_than_by_magnitude_and_by_the_same_mask_without_corrections(pattern) -> None:
    """Inputs with a spectrum that falls, as hidden features have one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64)).Q
    sizes = torch.logspace(0, -1.5, 256, dtype=torch.float64)
    x = torch.randn(2000, 256, generator=generator, dtype=torch.float64) * sizes @ directions
    found, kept = sparsegpt.solve(weight, moment(x), pattern, Config())
    by_size = magnitude.masks({"w": weight}, pattern, magnitude.Config())["w"]
    own = error(x, weight, found)
    assert own < 0.9 * error(x, weight, weight * by_size)
    assert own < 0.8 * error(x, weight, weight * kept)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 1 / 3, 0.5, 0.97])
@pytest.mark.parametrize("block", [1, 10, 128])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_numbers_are_exact_and_zeros_stay(sparsity: float, block: int, zeros: float) -> None:
    weight, x = problem(7, 33)
    weight[:, :16] *= torch.rand(7, 16, generator=torch.Generator().manual_seed(1)) > 2 * zeros
    zero = weight == 0
    found, kept = sparsegpt.solve(weight, moment(x), Pattern(sparsity), Config(block=block))
    assert int((~kept).sum()) == max(round(sparsity * 7 * 33), int(zero.sum()))
    assert torch.equal(found == 0, ~kept)
    assert not kept[zero].any()
    if not sparsity and not zeros:
        assert torch.equal(found, weight)


def test_a_zero_stays_in_n_of_m_too() -> None:
    weight, x = problem()
    weight[:, [0, 1, 2]] = 0.0
    found, kept = sparsegpt.solve(weight, moment(x), Pattern(0.5, 2, 4), Config())
    assert (found[:, :3] == 0).all()
    assert (kept[:, 4:].unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_inputs_that_are_never_there_go_first() -> None:
    weight, x = problem()
    x[:, [3, 20]] = 0.0
    found, kept = sparsegpt.solve(weight, moment(x), Pattern(0.25), Config())
    assert not kept[:, [3, 20]].any()
    assert int((~kept).sum()) == round(0.25 * 6 * 24)
    assert torch.isfinite(found).all()


def test_fewer_tokens_than_inputs_are_enough_with_damping() -> None:
    weight, x = problem(tokens=5)
    found, _ = sparsegpt.solve(weight, moment(x), Pattern(0.5), Config())
    by_size = magnitude.masks({"w": weight}, Pattern(0.5), magnitude.Config())["w"]
    assert error(x, weight, found) < 0.1 * error(x, weight, weight * by_size)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("pattern", [Pattern(0.37), Pattern(0.5, 2, 4)])
def test_a_whole_model_in_exact_numbers(family: str, pattern: Pattern) -> None:
    job = weight_job(tiny.checkpoint(family), pattern)
    found = sparsegpt.zero(job, Config())
    assert found.keys() == job.matrices.keys()
    for name, kept in found.items():
        assert torch.equal(job.matrices[name].weight != 0, kept)
        assert int((~kept).sum()) == round(pattern.sparsity * kept.numel())


def test_padding_and_batches_change_nothing() -> None:
    batch = tiny.batch()
    found = []
    for batches in (None, singly(batch), padded(batch, 9, tiny.checkpoint().pad_id)):
        job = weight_job(tiny.checkpoint(), Pattern(0.5), batches)
        found.append((sparsegpt.zero(job, Config()), job))
    (masks, first), *others = found
    for other, job in others:
        for name, kept in other.items():
            assert torch.equal(kept, masks[name])
            # Corrections are as exact as the float32 moments times the condition of a damped Hessian.
            torch.testing.assert_close(
                job.matrices[name].weight, first.matrices[name].weight, rtol=1e-3, atol=1e-4
            )
