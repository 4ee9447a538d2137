"""The divergence is the one SciPy knows, the greedy choice is the one found by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from kdcli.families import stack
from kdcli.stages.prune.criteria import layer_kl
from kdcli.stages.prune.criterion import LayerJob
from kdcli.tasks.classification import CLASSIFICATION
from tests import tiny


def batches(made, count: int = 3, extra: int = 0):
    found = []
    for seed in range(count):
        given = tiny.batch(made.model_type, seed=seed)
        if extra:
            pad = made.pad_id
            ids = torch.nn.functional.pad(given["input_ids"], (0, extra), value=pad)
            given = {
                "input_ids": ids,
                "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, extra)),
            }
        found.append((given, torch.zeros(len(given["input_ids"]), dtype=torch.long)))
    return found


def job_of(made, remove: float, prices=None, extra: int = 0) -> LayerJob:
    layers = stack.encoder_layers(made.model, made.family)
    prices = np.ones(len(layers)) if prices is None else np.array(prices, dtype=float)
    return LayerJob(made.model, made.family, prices, remove, batches(made, extra=extra))


def reference(made, kept: list[int], job: LayerJob) -> float:
    """KL by SciPy, with the layers left out by hooks that hand on what they were given."""

    def probabilities() -> np.ndarray:
        with torch.no_grad():
            return torch.cat([made.model(**x).logits.double().softmax(1) for x, _ in job.batches]).numpy()

    dense = probabilities()
    hooks = [
        layer.module.register_forward_hook(lambda _, args, output: args[0])
        for layer in stack.encoder_layers(made.model, made.family)
        if layer.index not in kept
    ]
    sparse = probabilities()
    for hook in hooks:
        hook.remove()
    return float(np.mean(entropy(dense, sparse, axis=1)))


def test_divergence_is_that_of_scipy_and_leaves_the_model_alone() -> None:
    made = tiny.checkpoint(layers=3)
    job = job_of(made, 1)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    dense = layer_kl.answers(made.model, job.batches)
    for kept in ([0, 1, 2], [0, 2], [1]):
        other = layer_kl.without(made.model, made.family, kept, job.batches)
        # The logits are float32.
        assert layer_kl.divergence(CLASSIFICATION, dense, other) == pytest.approx(
            reference(made, kept, job), abs=1e-6
        )
    after = made.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_layers_go_greedily_and_the_trace_says_why() -> None:
    made = tiny.checkpoint(layers=4, seed=2)
    job = job_of(made, 2)
    found = layer_kl.choose(job, layer_kl.Config())
    first = min(range(4), key=lambda i: reference(made, [j for j in range(4) if j != i], job))
    left = [i for i in range(4) if i != first]
    second = min(left, key=lambda i: reference(made, [j for j in left if j != i], job))
    assert [step["dropped"] for step in found.trace] == [first, second]
    assert found.keep == [i for i in left if i != second]
    assert sorted(found.trace[1]["candidates"]) == left
    assert found.trace[1]["kl"] == min(found.trace[1]["candidates"].values())


def test_a_layer_that_does_nothing_goes_first_and_costs_nothing() -> None:
    made = tiny.checkpoint(layers=3)
    layer = stack.encoder_layers(made.model, made.family)[1]
    with torch.no_grad():  # norm(x) of what is normalised already is x
        for module in (layer.attention_output, layer.ffn_out):
            module.weight.zero_()
            module.bias.zero_()
        for norm in (
            layer.attention_norm,
            layer.ffn_norm,
            stack.encoder_layers(made.model, made.family)[0].ffn_norm,
        ):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    found = layer_kl.choose(job_of(made, 1), layer_kl.Config())
    assert found.keep == [0, 2]
    assert found.trace[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_greedy_is_better_than_the_worst_choice_and_than_keeping_the_top() -> None:
    """What the method exists for: over random models it leaves less divergence than a fixed preset."""
    ours, preset = [], []
    for seed in range(8):
        made = tiny.checkpoint(layers=4, seed=seed)
        job = job_of(made, 2)
        kept = layer_kl.choose(job, layer_kl.Config()).keep
        every = {pair: reference(made, list(pair), job) for pair in itertools.combinations(range(4), 2)}
        ours.append(every[tuple(kept)])
        preset.append(every[0, 1])
        assert every[tuple(kept)] < max(every.values())
    assert np.mean(ours) < np.mean(preset)


def test_prices_decide_between_uneven_layers_and_when_to_stop() -> None:
    made = tiny.checkpoint(layers=3)
    kls = layer_kl.choose(job_of(made, 1), layer_kl.Config()).trace[0]["candidates"]
    dearest = max(kls, key=lambda i: kls[i])
    prices = [1.0] * 3
    prices[dearest] = 2 * max(kls.values()) / min(kls.values())
    found = layer_kl.choose(job_of(made, prices[dearest], prices), layer_kl.Config())
    assert dearest not in found.keep
    assert len(found.trace) == 1
    assert len(layer_kl.choose(job_of(made, 2.5), layer_kl.Config()).keep) == 1  # one stays
    assert layer_kl.choose(job_of(made, 0), layer_kl.Config()).keep == [0, 1, 2]
    assert layer_kl.choose(job_of(made, 1, [0.0, 1.0, 1.0]), layer_kl.Config()).keep != [0, 1, 2]


def test_padding_changes_nothing() -> None:
    made = tiny.checkpoint(layers=3)
    one, two = (layer_kl.choose(job_of(made, 1, extra=n), layer_kl.Config()) for n in (0, 6))
    assert one.keep == two.keep
    for layer, kl in one.trace[0]["candidates"].items():
        assert two.trace[0]["candidates"][layer] == pytest.approx(kl, abs=1e-6)
