"""Costs against torch's own counter, the choice against brute force, the search against its parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcli.errors import InputError, UsageError
from kdcli.families.stack import encoder_layers, encoder_linears
from kdcli.models import transforms
from kdcli.stages.prune.budget import (
    choose,
    costs,
    head_macs,
    layer_macs,
    macs_to_remove,
    neuron_macs,
    search,
)
from kdcli.stages.prune.criterion import UnitJob, Units
from tests import tiny

TOKENS = 11


def layers_of(made):
    return encoder_layers(made.model, made.family)


def counted_macs(made) -> int:
    """MACs of one row of TOKENS tokens, from torch's counter."""
    ids = torch.full((1, TOKENS), 5)
    with FlopCounterMode(display=False) as counter:
        made.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() // 2


def outside_macs(made) -> int:
    """MACs of what is not an encoder layer: the linear layers of pooler and classifier, one token each."""
    prefix = made.family.layers + "."
    modules = made.model.named_modules()
    return sum(
        m.weight.numel() for n, m in modules if isinstance(m, torch.nn.Linear) and not n.startswith(prefix)
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("state", ["dense", "cut", "emptied", "factorised", "factorised and cut"])
def test_layer_macs_are_what_torch_counts(family: str, state: str) -> None:
    made = tiny.checkpoint(family)
    if "factorised" in state:
        for name in encoder_linears(made.model, made.family):
            transforms.factorise(made.model, name, 5 if "dense" in name else 9)
    if "cut" in state:
        layers_of(made)[0].keep_heads([0, 3])
        layers_of(made)[1].keep_neurons([1, 2, 30])
    if state == "emptied":
        layers_of(made)[0].keep_heads([])
        layers_of(made)[1].keep_neurons([])
    total = sum(layer_macs(layer, TOKENS) for layer in layers_of(made))
    assert total == counted_macs(made) - outside_macs(made)


def test_unit_costs_are_the_published_formulas_and_sum_to_the_layer() -> None:
    made = tiny.checkpoint()
    layer, d, dh, t = layers_of(made)[0], 32, 8, TOKENS
    assert head_macs(layer, t) == 3 * t * d * dh + 2 * t * t * dh + t * dh * d
    assert neuron_macs(layer, t) == 2 * t * d
    assert 4 * head_macs(layer, t) + 48 * neuron_macs(layer, t) == layer_macs(layer, t)


@pytest.mark.parametrize("state", ["dense", "factorised"])
def test_a_unit_costs_what_its_removal_saves(state: str) -> None:
    made = tiny.checkpoint()
    if state == "factorised":
        for name in encoder_linears(made.model, made.family):
            transforms.factorise(made.model, name, 7)
    layer = layers_of(made)[0]
    before, head, neuron = layer_macs(layer, TOKENS), head_macs(layer, TOKENS), neuron_macs(layer, TOKENS)
    layer.keep_heads([1, 2, 3])
    assert before - layer_macs(layer, TOKENS) == head
    layer.keep_neurons(list(range(40)))
    assert before - head - layer_macs(layer, TOKENS) == 8 * neuron


def units(heads: list[list[float]], neurons: list[list[float]]) -> Units:
    return Units([np.array(x, dtype=float) for x in heads], [np.array(x, dtype=float) for x in neurons])


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_within_one_unit_of_the_best_subset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = units([rng.random(2), rng.random(2)], [rng.random(4), rng.random(3)])
    price = units([[5, 5], [7, 7]], [[1] * 4, [1] * 3])
    budget = float(rng.uniform(13, 31))
    kept = choose(score, price, budget).flat()
    values, prices = score.flat(), price.flat()
    best = 0.0
    for mask in itertools.product([False, True], repeat=len(values)):
        mask = np.array(mask)
        if prices[mask].sum() <= budget and mask[:4].any() and mask[4:].any():
            best = max(best, values[mask].sum())
    assert prices[kept].sum() <= budget
    assert best - values.max() <= values[kept].sum() <= best + 1e-12
    # Nothing that was left out would still fit.
    assert (prices[~kept] > budget - prices[kept].sum()).all()


def test_choice_of_one_kind_takes_the_highest_scores_over_all_layers() -> None:
    rng = np.random.default_rng(0)
    score = units([rng.random(4), rng.random(4)], [[], []])
    kept = choose(score, units([[3] * 4, [3] * 4], [[], []]), 10).flat()
    assert set(np.flatnonzero(kept)) == set(np.argsort(score.flat())[-3:])


def test_importance_counts_per_mac() -> None:
    # The head has the highest score, but five neurons fit in its place and say more together.
    score, price = units([[1.0, 4.0]], [[1.5] * 6]), units([[10, 10]], [[2] * 6])
    kept = choose(score, price, 22)
    assert kept.heads[0].tolist() == [False, True]
    assert kept.neurons[0].tolist() == [True] * 6
    kept = choose(score, price, 21)
    assert kept.neurons[0].tolist() == [True] * 5 + [False]  # ties in their order


def test_the_best_head_and_neuron_stay_under_any_budget() -> None:
    kept = choose(units([[1, 3], [2, 1]], [[1, 1], [1, 5]]), units([[9] * 2] * 2, [[2] * 2] * 2), 0.0)
    assert [x.tolist() for x in kept.heads] == [[False, True], [False, False]]
    assert [x.tolist() for x in kept.neurons] == [[False, False], [False, True]]


def test_sparsity_and_budget_refer_to_what_they_say() -> None:
    layers = layers_of(tiny.checkpoint())
    heads, neurons = 8 * head_macs(layers[0], TOKENS), 96 * neuron_macs(layers[0], TOKENS)
    assert macs_to_remove(layers, "heads", TOKENS, sparsity=0.25) == pytest.approx(0.25 * heads)
    assert macs_to_remove(layers, "heads+neurons", TOKENS, sparsity=0.25) == pytest.approx(
        0.25 * (heads + neurons)
    )
    assert macs_to_remove(layers, "neurons", TOKENS, budget=0.9) == pytest.approx(0.1 * (heads + neurons))
    with pytest.raises(UsageError, match="cannot be met by removing heads"):
        macs_to_remove(layers, "heads", TOKENS, budget=0.1)
    for layer in layers:
        layer.keep_neurons([])
    with pytest.raises(InputError, match="no neurons left"):
        macs_to_remove(layers, "neurons", TOKENS, sparsity=0.5)


def random_scores(layers, seed: int = 0):
    rng = np.random.default_rng(seed)
    return lambda: (
        Units([50 * rng.random(x.heads) for x in layers], [rng.random(x.neurons) for x in layers]),
        0.5,
    )


def job(model, layers, structure: str, remove: float) -> UnitJob:
    return UnitJob(model, layers, structure, lambda now: costs(now, TOKENS), remove, [])


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("structure", ["heads", "neurons", "heads+neurons"])
def test_one_composed_cut_replays_all_steps_of_the_search(family: str, structure: str) -> None:
    made, fresh, inputs = tiny.checkpoint(family), tiny.checkpoint(family), tiny.batch(family)
    layers = layers_of(made)
    whole = sum(layer_macs(layer, TOKENS) for layer in layers)
    remove = 0.5 * float(costs(layers, TOKENS).only(structure).flat().sum())
    found = search(job(made.model, layers, structure, remove), random_scores(layers), 5)
    cut, trace = found.cut, found.trace
    transforms.apply(fresh.model, cut)
    with torch.no_grad():
        assert torch.equal(fresh.model(**inputs).logits, made.model(**inputs).logits)
    assert [t["loss"] for t in trace] == [0.5] * 5
    assert bool(cut.heads) == ("heads" in structure)
    assert bool(cut.neurons) == ("neurons" in structure)
    left = sum(layer_macs(layer, TOKENS) for layer in layers)
    # Met, and not by more than the cheapest unit that could go.
    unit = head_macs(layers_of(fresh)[0], TOKENS) if structure == "heads" else 2 * TOKENS * 32
    assert whole - remove - unit < left <= whole - remove + 1e-6


def test_nothing_to_remove_asks_for_no_estimate() -> None:
    made = tiny.checkpoint()

    def never():
        raise AssertionError("estimated")

    found = search(job(made.model, layers_of(made), "heads", 0.0), never, 8)
    assert (found.cut.heads, found.cut.neurons, found.trace) == ({}, {}, [])


def test_steps_estimate_anew_and_so_keep_one_of_two_redundant_heads() -> None:
    """Heads 0 and 1 do the same: each looks dispensable until the other is gone. One-shot drops both."""
    left = {}
    for steps in (1, 2):
        made = tiny.checkpoint(layers=1)
        layer = layers_of(made)[0]
        with torch.no_grad():  # a head's number, to know it again after a cut
            layer.value.bias.copy_(torch.arange(4.0).repeat_interleave(8))

        def estimate(layer=layer):
            heads = layer.value.bias.detach()[::8].tolist()
            pair = 0.1 if {0.0, 1.0} <= set(heads) else 9.0
            return units([[pair if h < 2 else h for h in heads]], [[1] * 48]), 0.0

        remove = 2 * head_macs(layer, TOKENS)
        search(job(made.model, [layer], "heads", remove), estimate, steps)
        left[steps] = layer.value.bias.detach()[::8].tolist()
    assert left == {1: [2, 3], 2: [0, 3]}
