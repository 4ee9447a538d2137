"""Magnitudes of weights and of units against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.families.stack import encoder_layers
from kdcli.models import transforms
from kdcli.stages.prune.budget import costs
from kdcli.stages.prune.criteria import magnitude
from kdcli.stages.prune.criteria.magnitude import Config
from kdcli.stages.prune.criterion import Pattern, UnitJob
from tests import tiny


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
    found = magnitude.masks(weights, Pattern(sparsity), Config())
    for name, weight in weights.items():
        assert np.array_equal(found[name].numpy(), np.abs(weight.numpy()) > limit)


def test_layer_scope_takes_the_same_share_of_every_matrix() -> None:
    weights = matrices()
    found = magnitude.masks(weights, Pattern(0.5), Config(scope="layer"))
    for name, weight in weights.items():
        kept = found[name].numpy()
        assert (~kept).sum() == round(0.5 * weight.numel())
        size = np.abs(weight.numpy())
        assert size[~kept].max() < size[kept].min()
    # The global scope would have emptied the small matrix first.
    assert not magnitude.masks(weights, Pattern(0.5), Config())["c"].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_limits(scope: str) -> None:
    weights = matrices()
    config = Config.model_validate({"scope": scope})
    assert all(m.all() for m in magnitude.masks(weights, Pattern(0.0), config).values())
    assert not any(m.any() for m in magnitude.masks(weights, Pattern(1.0), config).values())


def test_ties_are_cut_to_the_exact_count_in_their_order() -> None:
    weights = {"a": torch.tensor([[1.0, -1.0], [1.0, 2.0]]), "b": torch.tensor([[-1.0, 1.0, 0.5, 3.0]])}
    found = magnitude.masks(weights, Pattern(0.5), Config())
    # Of eight weights four go: 0.5, and the first three of the five ones.
    assert found["a"].tolist() == [[False, False], [False, True]]
    assert found["b"].tolist() == [[True, True, False, True]]


def test_zeros_that_are_there_count() -> None:
    weight = torch.tensor([[0.0, 0.0, 3.0, 1.0]])
    assert magnitude.masks({"w": weight}, Pattern(0.5), Config())["w"].tolist() == [
        [False, False, True, True]
    ]


def test_masks_follow_a_permutation_of_the_weights() -> None:
    weights = matrices()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = weights | {"a": weights["a"][order]}
    plain, other = (magnitude.masks(w, Pattern(0.4), Config()) for w in (weights, moved))
    assert torch.equal(plain["a"][order], other["a"])
    assert torch.equal(plain["b"], other["b"])


def test_n_of_m_keeps_the_largest_of_every_block() -> None:
    weights = {"w": torch.tensor([[0.1, -3.0, 2.0, 0.5, 7.0, -8.0, 9.0, 0.0]])}
    found = magnitude.masks(weights, Pattern(0.5, 2, 4), Config())
    assert found["w"].tolist() == [[False, True, True, False, False, True, True, False]]


def layers_of(made):
    return encoder_layers(made.model, made.family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_units_score_is_the_size_of_what_its_removal_takes(family: str, norm: magnitude.Norm) -> None:
    made = tiny.checkpoint(family)

    def size() -> float:
        weights = [m.weight for _, m in made.model.named_modules() if isinstance(m, torch.nn.Linear)]
        total = sum(w.detach().double().abs().pow(1 if norm == "l1" else 2).sum() for w in weights)
        return float(total)

    layer = layers_of(made)[1]
    scores, whole = magnitude.importance(layers_of(made), norm), size()
    layer.keep_heads([0, 2, 3])
    without_head = size()
    layer.keep_neurons([i for i in range(48) if i != 5])
    assert scores.heads[1][1] == pytest.approx(whole - without_head, rel=1e-9)
    assert scores.neurons[1][5] == pytest.approx(without_head - size(), rel=1e-9)


def test_the_smallest_units_are_cut_and_a_factorised_model_too() -> None:
    for factorised in (False, True):
        made = tiny.checkpoint()
        layer = layers_of(made)[0]
        if factorised:
            transforms.factorise(made.model, "bert.encoder.layer.0.attention.self.query", 6)
        with torch.no_grad():  # the outputs of head 2 and of the first neurons hardly count
            layer.attention_output.weight[:, 16:24] = 0
            layer.value.weight[16:24] = 0
            layer.ffn_out.weight[:, :4] = 0
            layer.ffn_in.weight[:4] = 0
        price = costs(layers_of(made), 9)
        remove = float(price.heads[0][0] + 4 * price.neurons[0][0])
        job = UnitJob(made.model, layers_of(made), "heads+neurons", lambda now: costs(now, 9), remove, [])
        cut = magnitude.prune(job, Config()).cut
        assert cut.neurons == {0: list(range(4, 48))}
        assert cut.heads == {0: [0, 1, 3]}
