"""Whitened factorisation against the textbook solution, written out densely in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.methods.lowrank import whitening
from kdcli.methods.lowrank.whitening import Moments
from kdcli.models.families import encoder_linears
from tests import tiny

SHAPES = [(6, 10), (10, 6), (8, 8)]  # (O, I): fewer outputs than inputs, more, and as many


def inputs(count: int, width: int, *, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Anisotropic vectors with a large mean, (N, I); ``rank`` limits the space they span around it."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.03, width)[:, None]
    if rank is not None:
        mixing[rank:] = 0
    return torch.from_numpy(rng.normal(size=(count, width)) @ mixing + 3 * rng.normal(size=width)).float()


def layer_of(shape: tuple[int, int], *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(shape[1], shape[0], bias=bias)


def solved(layer: nn.Linear, x: torch.Tensor) -> whitening.Spectrum:
    values = layer(x) if layer.out_features < layer.in_features else x
    moments = Moments(values.shape[1], values.device)
    for part in values.split(37):
        moments.add(part)
    return whitening.decompose(layer, moments)


def pair_of(layer: nn.Linear, spectrum: whitening.Spectrum, rank: int) -> nn.Module:
    return whitening.install(nn.Sequential(layer), "0", spectrum, rank)


def error(layer: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Mean over the rows of the squared distance of the outputs."""
    with torch.no_grad():
        return float((layer(x) - other(x)).double().square().sum(1).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_textbook_solution(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape), inputs(500, shape[1])
    spectrum = solved(layer, x)
    # The textbook: S = chol(C), W S = U D V^T, W' = U_r D_r V_r^T S^-1, b' = b + (W - W') mu.
    weight, data = layer.weight.detach().double().numpy(), x.double().numpy()
    mean = data.mean(0)
    root = np.linalg.cholesky((data - mean).T @ (data - mean) / len(data))
    u, d, vt = np.linalg.svd(weight @ root, full_matrices=False)
    np.testing.assert_allclose(spectrum.energies, d**2, rtol=1e-5, atol=1e-6 * d[0] ** 2)
    for rank in range(1, min(shape) + 1):
        textbook = u[:, :rank] * d[:rank] @ vt[:rank] @ np.linalg.inv(root)
        pair = pair_of(layer, spectrum, rank)
        product = (pair.second.weight @ pair.first.weight).detach().numpy()
        np.testing.assert_allclose(product, textbook, atol=2e-4)
        bias = layer.bias.detach().numpy() + (weight - textbook) @ mean
        np.testing.assert_allclose(pair.bias.detach().numpy(), bias, atol=2e-3)
        # What the spectrum says was dropped is what the factors really cost, of a total energy of sum(d^2).
        dropped = float((d[rank:] ** 2).sum())
        assert error(layer, pair, x) == pytest.approx(dropped, rel=1e-4, abs=1e-6 * float((d**2).sum()))
        assert spectrum.error(rank) == pytest.approx(dropped / float((d**2).sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 3, 0])
def test_full_rank_changes_nothing_even_off_the_calibration_inputs(
    shape: tuple[int, int], rank: int | None
) -> None:
    layer = layer_of(shape)
    spectrum = solved(layer, inputs(200, shape[1], rank=rank))
    pair = pair_of(layer, spectrum, min(shape))
    elsewhere = torch.randn(50, shape[1])
    torch.testing.assert_close(pair(elsewhere), layer(elsewhere), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_deficient_inputs_need_no_more_directions_than_they_have(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape), inputs(300, shape[1], rank=3)
    spectrum = solved(layer, x)
    assert spectrum.error(3) < 1e-6 < spectrum.error(2)
    torch.testing.assert_close(pair_of(layer, spectrum, 3)(x), layer(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constant", [torch.zeros, torch.ones, torch.randn])
def test_constant_inputs_and_a_zero_matrix(shape: tuple[int, int], constant) -> None:
    layer, x = layer_of(shape), constant(1, shape[1]).repeat(60, 1)
    spectrum = solved(layer, x)
    assert spectrum.energies.sum() < 1e-10
    torch.testing.assert_close(pair_of(layer, spectrum, 1)(x), layer(x), rtol=0, atol=1e-5)
    nn.init.zeros_(layer.weight)
    x = inputs(60, shape[1])
    pair = pair_of(layer, solved(layer, x), 2)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_never_worse_than_plain_svd(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape), inputs(500, shape[1])
    spectrum = solved(layer, x)
    u, d, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    gains = []
    for rank in range(1, min(shape)):
        plain = layer_of(shape)
        plain.weight = nn.Parameter(u[:, :rank] * d[:rank] @ v[:rank])
        gains.append(error(layer, plain, x) / error(layer, pair_of(layer, spectrum, rank), x))
    assert min(gains) >= 1
    assert max(gains) > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_without_bias_approximates_its_mean_too(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape, bias=False), inputs(500, shape[1])
    data, weight = x.double().numpy(), layer.weight.detach().double().numpy()
    d = np.linalg.svd(weight @ np.linalg.cholesky(data.T @ data / len(data)), compute_uv=False)
    pair = pair_of(layer, solved(layer, x), 3)
    assert pair.bias is None
    assert error(layer, pair, x) == pytest.approx(float((d[3:] ** 2).sum()), rel=1e-3)


def test_moments_of_small_spread_around_a_large_mean() -> None:
    data = np.random.default_rng(0).normal(size=(1000, 4)) * [1, 0.1, 0.01, 0.01] + [1000, -1000, 10, 0]
    single = torch.from_numpy(data).float()
    moments = Moments(4, single.device)
    for part in (single[:1], single[1:1], single[1:600], single[600:]):
        moments.add(part)
    exact = single.double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(0), rtol=1e-6, atol=1e-6)
    spread = exact.std(0)
    scaled = moments.covariance.numpy() / np.outer(spread, spread)
    np.testing.assert_allclose(scaled, np.corrcoef(exact.T), atol=2e-3)


def test_energy_gives_the_lowest_rank_that_keeps_it() -> None:
    spectrum = whitening.Spectrum(torch.eye(4), np.array([5.0, 3.0, 1.5, 0.5]), torch.zeros(4))
    assert [spectrum.rank(e) for e in (0.1, 0.5, 0.51, 0.95, 1.0)] == [1, 1, 2, 3, 4]
    assert spectrum.error(2) == pytest.approx(0.2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_does_not_count(family: str) -> None:
    made = tiny.checkpoint(family)
    layers = encoder_linears(made.model, made.family)
    batch = tiny.batch(family)
    wide = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 9), value=made.pad_id),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 9)),
    }
    found: list[dict[str, Moments]] = [{}, {}]
    logits = [
        whitening.collect(made.model, layers, [b], m)[0] for b, m in zip((batch, wide), found, strict=True)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    for name in layers:
        assert found[0][name].count == found[1][name].count == int(batch["attention_mask"].sum())
        one, two = (m[name].covariance for m in found)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(one.diagonal().max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_query_key_and_value_share_statistics_counted_once(family: str) -> None:
    made = tiny.checkpoint(family)
    layers = encoder_linears(made.model, made.family)
    batches = [tiny.batch(family, seed=s) for s in (0, 1)]
    moments: dict[str, Moments] = {}
    whitening.collect(made.model, layers, batches, moments)
    prefix = f"{made.family.layers}.1."
    paths = (made.family.query, made.family.key, made.family.value, made.family.attention_output)
    query, key, value, output = (moments[prefix + path] for path in paths)
    assert query is key is value
    assert query is not output
    assert query is not moments[prefix.replace(".1.", ".0.") + made.family.query]
    assert query.count == sum(int(b["attention_mask"].sum()) for b in batches)
