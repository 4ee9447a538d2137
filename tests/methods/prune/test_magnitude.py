"""Magnitude masks against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.methods.prune import magnitude
from kdcli.methods.prune.magnitude import Config


def matrices(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 9, generator=generator),
        "b": torch.randn(12, 5, generator=generator) * 10,
        "c": torch.randn(4, 4, generator=generator) * 0.1,
    }


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
def test_global_masks_are_those_above_the_quantile(sparsity: float) -> None:
    weights = matrices()
    flat = np.abs(np.concatenate([w.numpy().ravel() for w in weights.values()]))
    # The inverted CDF at (k - 1/2) / n is the k-th smallest value.
    count = round(sparsity * flat.size)
    limit = np.quantile(flat, (count - 0.5) / flat.size, method="inverted_cdf")
    found = magnitude.masks(weights, sparsity, Config())
    for name, weight in weights.items():
        assert np.array_equal(found[name].numpy(), np.abs(weight.numpy()) > limit)


def test_layer_scope_takes_the_same_share_of_every_matrix() -> None:
    weights = matrices()
    found = magnitude.masks(weights, 0.5, Config(scope="layer"))
    for name, weight in weights.items():
        kept = found[name].numpy()
        assert (~kept).sum() == round(0.5 * weight.numel())
        size = np.abs(weight.numpy())
        assert size[~kept].max() < size[kept].min()
    # The global scope would have emptied the small matrix first.
    assert not magnitude.masks(weights, 0.5, Config())["c"].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_limits(scope: str) -> None:
    weights = matrices()
    config = Config.model_validate({"scope": scope})
    assert all(m.all() for m in magnitude.masks(weights, 0.0, config).values())
    assert not any(m.any() for m in magnitude.masks(weights, 1.0, config).values())


def test_ties_are_cut_to_the_exact_count_in_their_order() -> None:
    weights = {"a": torch.tensor([[1.0, -1.0], [1.0, 2.0]]), "b": torch.tensor([[-1.0, 1.0, 0.5, 3.0]])}
    found = magnitude.masks(weights, 0.5, Config())
    # Of eight weights four go: 0.5, and the first three of the five ones.
    assert found["a"].tolist() == [[False, False], [False, True]]
    assert found["b"].tolist() == [[True, True, False, True]]


def test_zeros_that_are_there_count() -> None:
    weight = torch.tensor([[0.0, 0.0, 3.0, 1.0]])
    assert magnitude.masks({"w": weight}, 0.5, Config())["w"].tolist() == [[False, False, True, True]]


def test_masks_follow_a_permutation_of_the_weights() -> None:
    weights = matrices()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = weights | {"a": weights["a"][order]}
    plain, other = (magnitude.masks(w, 0.4, Config()) for w in (weights, moved))
    assert torch.equal(plain["a"][order], other["a"])
    assert torch.equal(plain["b"], other["b"])
