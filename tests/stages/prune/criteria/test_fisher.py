"""The search against brute force, the rearrangement against a loop, the tuning against numpy's least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kdcli.families.stack import encoder_layers, encoder_linears
from kdcli.models import transforms
from kdcli.models.transforms import Cut
from kdcli.probe.layer_stream import Pair
from kdcli.probe.raw_moments import RawMoments
from kdcli.stages.prune.budget import choose, costs, layer_macs
from kdcli.stages.prune.criteria import fisher, taylor
from kdcli.stages.prune.criterion import UnitJob, Units
from tests import tiny

LABELS = torch.tensor([0, 1, 1, 0, 1])
TOKENS = 9.0


def units(heads: list[list[float]], neurons: list[list[float]]) -> Units:
    return Units([np.array(x, dtype=float) for x in heads], [np.array(x, dtype=float) for x in neurons])


def random_units(seed: int, head_prices: list[float], neuron_prices: list[float]) -> tuple[Units, Units]:
    """Scores and prices of 2 layers of 2 heads, and of 4 and 3 neurons."""
    rng = np.random.default_rng(seed)
    score = units([rng.random(2), rng.random(2)], [rng.random(4), rng.random(3)])
    price = units(
        [[p] * 2 for p in head_prices], [[p] * n for p, n in zip(neuron_prices, (4, 3), strict=True)]
    )
    return score, price


def best_value(score: Units, price: Units, budget: float) -> float:
    values, prices = score.flat(), price.flat()
    found = 0.0
    for bits in itertools.product([False, True], repeat=len(values)):
        mask = np.array(bits)
        if prices[mask].sum() <= budget and mask[:4].any() and mask[4:].any():
            found = max(found, values[mask].sum())
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_best_mask_where_each_kind_has_one_price(seed: int) -> None:
    score, price = random_units(seed, [5, 5], [1, 1])
    budget = float(np.random.default_rng(seed + 100).uniform(7, 27))
    kept = fisher.allocate(score, price, budget).flat()
    assert price.flat()[kept].sum() <= budget
    assert score.flat()[kept].sum() == pytest.approx(best_value(score, price, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_with_uneven_prices_it_is_within_one_head_and_one_neuron_of_the_best(seed: int) -> None:
    score, price = random_units(seed, [5, 7.5], [1, 1.5])
    budget = float(np.random.default_rng(seed + 100).uniform(10, 35))
    kept = fisher.allocate(score, price, budget).flat()
    values, prices = score.flat(), price.flat()
    assert prices[kept].sum() <= budget
    # Each kind is filled up to the unit that no longer fits.
    assert values[kept].sum() >= best_value(score, price, budget) - values[:4].max() - values[4:].max()
    assert (prices[~kept] > budget - prices[kept].sum()).all()


def test_the_search_weighs_numbers_of_heads_where_a_greedy_choice_gets_stuck() -> None:
    # By importance per price the neurons (2 each) come before the heads (1.9 each per price of 10); after four of
    # them the budget has room for one head, after none for two.
    score, price = units([[19, 19]], [[2.1] * 4]), units([[10, 10]], [[1] * 4])
    greedy, found = choose(score, price, 21.0), fisher.allocate(score, price, 21.0)
    assert greedy.heads[0].tolist() == [True, False]
    assert found.heads[0].tolist() == [True, True]
    assert score.flat()[found.flat()].sum() > score.flat()[greedy.flat()].sum()


def test_limits_of_the_search() -> None:
    score, price = units([[1, 3], [2, 1]], [[1, 1], [1, 5]]), units([[9] * 2] * 2, [[2] * 2] * 2)
    nothing = fisher.allocate(score, price, 0.0)
    assert [x.tolist() for x in nothing.heads] == [[False, True], [False, False]]
    assert [x.tolist() for x in nothing.neurons] == [[False, False], [False, True]]
    assert fisher.allocate(score, price, float(price.flat().sum())).flat().all()
    heads = fisher.allocate(score.only("heads"), price.only("heads"), 20.0)
    assert [x.tolist() for x in heads.heads] == [[False, True], [True, False]]
    assert [len(x) for x in heads.neurons] == [0, 0]
    neurons = fisher.allocate(score.only("neurons"), price.only("neurons"), 3.0)
    assert neurons.flat().tolist() == [False, False, False, True]


def quadratic(matrix: np.ndarray, pruned: list[int]) -> float:
    return float(matrix[np.ix_(pruned, pruned)].sum())


def naive_rearrangement(matrix: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The published loop, word for word: every candidate set is built and its value computed."""
    pruned = np.flatnonzero(~kept).tolist()
    for unit in sorted(np.flatnonzero(kept), key=lambda u: matrix[u, u]):
        joined = [*pruned, int(unit)]
        without = [[u for u in joined if u != gone] for gone in joined]
        pruned = min(without, key=lambda candidate: quadratic(matrix, candidate))
    return np.array([u not in pruned for u in range(len(kept))])


@pytest.mark.parametrize("seed", range(8))
def test_the_rearrangement_is_the_published_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(6, 14)) * rng.gamma(1.0, size=14)
    matrix = gradients.T @ gradients
    kept = np.ones(14, dtype=bool)
    kept[np.argsort(matrix.diagonal())[: 3 + seed]] = False
    found = fisher.rearrange(matrix, kept)
    assert found.tolist() == naive_rearrangement(matrix, kept).tolist()
    assert found.sum() == kept.sum()
    before, after = (quadratic(matrix, np.flatnonzero(~x).tolist()) for x in (kept, found))
    assert after <= before * (1 + 1e-12)


def test_a_unit_that_cancels_a_pruned_one_goes_although_it_matters_more_by_itself() -> None:
    gradients = np.array([[2.0, 1.0], [-2.1, -1.1], [0.9, -2.0], [3.0, 0.0]]).T
    matrix = gradients.T @ gradients  # diagonal 5, 5.62, 4.81, 9
    by_diagonal = np.array([False, True, False, True])
    assert fisher.rearrange(matrix, by_diagonal).tolist() == [False, False, True, True]


def test_without_interaction_nothing_moves() -> None:
    matrix = np.diag([5.0, 1.0, 4.0, 2.0])
    for kept in ([True, False, True, False], [True] * 4, [False] * 4):
        assert fisher.rearrange(matrix, np.array(kept)).tolist() == kept


def moments(h: torch.Tensor, t: torch.Tensor) -> RawMoments:
    return RawMoments(h.T @ h, h.T @ t, float(t.square().sum()), h.sum(0), t.sum(0), float(len(h)))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("damp", [1e-9, 0.1])
def test_tuned_masks_are_the_damped_least_squares_solution(width: int, damp: float) -> None:
    rng = np.random.default_rng(width)
    h, weight, target = rng.normal(size=(40, 6)) + 1.5, rng.normal(size=(5, 6)), rng.normal(size=(40, 5))
    bias = rng.normal(size=5)
    found = fisher.solve(
        *fisher.normal_equations(
            moments(torch.from_numpy(h), torch.from_numpy(target)),
            torch.from_numpy(weight),
            torch.from_numpy(bias),
            width,
        ),
        damp,
    )
    # One row a token and output, one column a mask; the bias stays.
    aim = target - bias
    columns = (h[:, None, :] * weight[None]).reshape(40, 5, 6 // width, width).sum(3)
    design = columns.reshape(200, -1) / np.sqrt(40)  # per token, as the damping is
    pull = np.sqrt(damp * np.square(design).sum(0).mean()) * np.eye(design.shape[1])
    right = np.concatenate([aim.reshape(200) / np.sqrt(40) - design.sum(1), np.zeros(len(pull))])
    expected = 1 + np.linalg.lstsq(np.concatenate([design, pull]), right, rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_strong_damping_holds_every_mask_at_one_and_silent_units_keep_it() -> None:
    gram, right = torch.diag(torch.tensor([4.0, 1.0, 0.0])).double(), torch.tensor([8.0, 3.0, 0.0]).double()
    assert torch.allclose(
        fisher.solve(gram, right, 1e9), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8
    )
    free = fisher.solve(gram, right, 1e-12)
    assert torch.allclose(free, torch.tensor([2.0, 3.0, 1.0]).double(), rtol=0, atol=1e-9)


def setting(family: str = "bert", rows: int = 5, **sizes: int):
    made = tiny.checkpoint(family, **sizes)
    inputs = tiny.batch(family, rows=rows)
    return made, encoder_layers(made.model, made.family), [(inputs, LABELS.repeat(rows // 5))]


def job(made, layers, batches, *, share: float = 0.5, structure: str = "heads+neurons", **more) -> UnitJob:
    remove = (1 - share) * float(costs(layers, TOKENS).only(structure).flat().sum())
    return UnitJob(made.model, layers, structure, lambda now: costs(now, TOKENS), remove, batches, **more)


@torch.no_grad()
def logits(made, batches) -> torch.Tensor:
    return made.model(**batches[0][0]).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tuning_an_unpruned_model_changes_nothing(family: str) -> None:
    made, layers, batches = setting(family)
    before = logits(made, batches)
    found = fisher.tune(
        Pair(made.model, made.family, layers, batches), fisher.Config(limit=1.001), "heads+neurons"
    )
    assert found["parts"] == 4
    # Sums of products in float32 leave 1e-6 of the moments, which the damping of 1e-2 makes 1e-4 of a mask at worst.
    assert found["furthest_from_one"] == pytest.approx(1, abs=1e-4)
    assert torch.allclose(logits(made, batches), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("structure", fisher.METHOD.structures)
def test_the_cut_meets_the_budget_and_replays(family: str, structure: str) -> None:
    made, layers, batches = setting(family)
    whole = sum(layer_macs(layer, TOKENS) for layer in layers)
    given = job(made, layers, batches, structure=structure)
    found = fisher.prune(given, fisher.Config(steps=2, tune=True))
    left = sum(layer_macs(layer, TOKENS) for layer in layers)
    unit = float(max(costs(layers, TOKENS).only(structure).flat()))
    assert whole - given.remove - unit < left <= whole - given.remove + 1e-6
    fresh = tiny.checkpoint(family, seed=3)
    transforms.apply(fresh.model, found.cut)
    fresh.model.load_state_dict(made.model.state_dict())  # strict: names and shapes are the same
    assert torch.equal(logits(fresh, batches), logits(made, batches))
    assert (bool(found.cut.heads), bool(found.cut.neurons)) == ("heads" in structure, "neurons" in structure)


@torch.no_grad()
def first_layer(made, batches) -> torch.Tensor:
    """Its output at the real tokens (N, D)."""
    states = made.model(**batches[0][0], output_hidden_states=True).hidden_states[1]
    return states[batches[0][0]["attention_mask"].bool()]


@pytest.mark.parametrize("state", ["dense", "emptied", "factorised"])
def test_tuning_brings_layers_closer_to_those_of_the_dense_model(state: str) -> None:
    """Also through layers without heads or neurons, and through factor pairs."""
    error = {}
    for tune in (False, True):
        made, layers, batches = setting(rows=40)
        if state == "factorised":
            for name in encoder_linears(made.model, made.family):
                pair = transforms.factorise(made.model, name, 20)
                torch.manual_seed(1)
                for parameter in pair.parameters():
                    torch.nn.init.normal_(parameter, std=0.25)
        if state == "emptied":
            transforms.apply(made.model, Cut(heads={0: []}, neurons={1: []}))
        dense = first_layer(made, batches)
        found = fisher.prune(
            job(made, layers, batches, share=0.6), fisher.Config(tune=tune, damp=0.01, steps=1)
        )
        assert ("tuning" in found.detail) is tune
        error[tune] = float((first_layer(made, batches) - dense).square().mean())
    assert error[True] < 0.95 * error[False]  # LayerNorm is between what is fitted and what is compared


def test_padding_changes_neither_the_cut_nor_the_weights() -> None:
    found = []
    for padding in (0, 6):
        made, layers, batches = setting(rows=10)
        inputs, labels = batches[0]
        more = {
            "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, padding), value=0),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, padding)),
        }
        cut = fisher.prune(job(made, layers, [(more, labels)]), fisher.Config(steps=2, tune=True)).cut
        found.append((cut, made.model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        # float32 sums in another order, through the solve of a system with a condition of some hundreds.
        assert torch.allclose(tensor, found[1][1][name], rtol=1e-3, atol=1e-4), name


def test_beyond_the_limit_tuning_stops_and_says_where() -> None:
    untuned, tuned = setting(), setting()
    fisher.prune(job(*untuned), fisher.Config(tune=False, steps=1))
    found = fisher.prune(job(*tuned), fisher.Config(tune=True, limit=1.001, damp=1e-6, steps=1)).detail[
        "tuning"
    ]
    stopped = found["stopped_at"]
    assert stopped["layer"] == 0
    assert found["parts"] == {"heads": 0, "neurons": 1}[stopped["part"]]
    assert abs(found["furthest_from_one"]) <= 1.001
    before, after = untuned[1][1], tuned[1][1]
    assert torch.equal(before.ffn_out.weight, after.ffn_out.weight)
    assert torch.equal(before.attention_output.bias, after.attention_output.bias)


def test_one_step_without_extras_is_squared_taylor_importance_with_the_better_search() -> None:
    made, layers, batches = setting(rows=10)
    scores, _ = taylor.importance(made.model, layers, batches, "squared")
    kept = fisher.allocate(scores, costs(layers, TOKENS), 0.5 * float(costs(layers, TOKENS).flat().sum()))
    cut = fisher.prune(
        job(made, layers, batches, iterative=False), fisher.Config(tune=False, rearrange=False)
    ).cut
    for i in range(2):
        assert cut.neurons.get(i, list(range(48))) == np.flatnonzero(kept.neurons[i]).tolist()
        assert cut.heads.get(i, list(range(4))) == np.flatnonzero(kept.heads[i]).tolist()


def test_nothing_to_remove_looks_at_nothing() -> None:
    made, layers, _ = setting()
    found = fisher.prune(job(made, layers, [], share=1.0), fisher.Config())
    assert (found.cut.heads, found.cut.neurons, found.trace) == ({}, {}, [])
