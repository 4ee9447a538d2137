"""The closed form against the iteration it solves, and against matrices of known rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdcli.stages.lowrank import evbmf


def iterated(singular: Any, short: int, long: int, noise: Any) -> np.ndarray:
    """Twice the free energy, against that of no component, where the iterated posterior of one component ends.

    The mean-field updates of the posterior of a (M,) and b (L,), and of their prior variances, written out for
    each singular value; the energy of the solution a = b = 0 is 0.
    """
    a = b = np.sqrt(singular)
    va, vb = noise / singular, noise / singular
    for _ in range(3000):
        ca, cb = (a * a + long * va) / long, (b * b + short * vb) / short
        va = 1 / ((b * b + short * vb) / noise + 1 / ca)
        a = va / noise * singular * b
        vb = 1 / ((a * a + long * va) / noise + 1 / cb)
        b = vb / noise * singular * a
    ea, eb = a * a + long * va, b * b + short * vb
    ca, cb = ea / long, eb / short
    prior = long * np.log(ca / va) + short * np.log(cb / vb) + ea / ca + eb / cb - (long + short)
    return prior + (ea * eb - 2 * a * b * singular) / noise


def noisy(short: int, long: int, rank: int, noise: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    product = random.normal(size=(short, rank)) @ random.normal(size=(rank, long))
    return product + noise**0.5 * random.normal(size=(short, long))


@pytest.mark.parametrize(("short", "long"), [(20, 20), (20, 60), (5, 200)])
def test_threshold_is_where_a_component_starts_to_pay(short: int, long: int) -> None:
    noise = 0.7
    edge = np.sqrt(long * noise * evbmf.threshold(short / long))
    # The energy of the iterated solution changes its sign there; 0.5% either side is far above what is left
    # after 3000 updates.
    assert iterated(edge * 1.005, short, long, noise) < 0 < iterated(edge * 0.995, short, long, noise)


def test_noise_variance_minimises_the_free_energy_of_the_iteration() -> None:
    short, long = 6, 15
    squares = np.linalg.svd(noisy(short, long, 2, 0.4), compute_uv=False) ** 2
    grid = np.geomspace(0.1, 2.0, 60)
    each = np.minimum(0.0, iterated(np.sqrt(squares)[None], short, long, grid[:, None]))
    energies = short * long * np.log(grid) + squares.sum() / grid + each.sum(1)
    found = evbmf.noise_variance(squares, short, long)
    # A step of the grid is 5%.
    assert found == pytest.approx(grid[int(np.argmin(energies))], rel=0.05)


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_rank_of_a_noisy_product(rank: int, shape: tuple[int, int]) -> None:
    short, long = sorted(shape)
    matrix = noisy(short, long, rank, 0.5)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert evbmf.rank(torch.from_numpy(matrix if shape[0] == short else matrix.T)) == rank
    # Its standard error is s sqrt(2 / (L M)), 3% here; the components take some noise with them.
    assert evbmf.noise_variance(squares, short, long) == pytest.approx(0.5, rel=0.15)


def test_noise_alone_has_no_component() -> None:
    matrix = np.random.default_rng(0).normal(size=(50, 120))
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert evbmf.components(squares, 50, 120) == 0
    assert evbmf.rank(torch.from_numpy(matrix)) == 1


def test_scale_does_not_matter() -> None:
    matrix = noisy(30, 50, 5, 0.5)
    assert {evbmf.rank(torch.from_numpy(matrix * scale)) for scale in (1e-6, 1.0, 1e6)} == {5}


@pytest.mark.parametrize("rank", [0, 3])
def test_matrix_without_noise_keeps_its_rank(rank: int) -> None:
    assert evbmf.rank(torch.from_numpy(noisy(12, 20, rank, 0.0)).float()) == max(1, rank)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_vectors(shape: tuple[int, int]) -> None:
    assert evbmf.rank(torch.ones(shape)) == 1
