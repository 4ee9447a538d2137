"""K-prune: knowledge against a loop over rows and units, the budget, and what the refit is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.stages.prune.criteria import kprune
from tests import tiny
from tests.stages.prune.criteria.refitting import (
    batches,
    divergence,
    doubled,
    halves_and_beats_taylor,
    job_of,
)

CONFIG = kprune.Config(ridge=1e-5)


def scaled(module: Any, unit: int, width: int, factor: torch.Tensor) -> Any:
    def hook(_, args):
        gate = torch.ones(args[0].shape[-1])
        gate = torch.where(torch.arange(len(gate)) // width == unit, factor, gate)
        return (args[0] * gate,)

    return module.register_forward_pre_hook(hook)


def test_knowledge_is_the_published_sum_row_by_row() -> None:
    made = tiny.checkpoint()
    rows = batches(rows=6)
    job = job_of(made, "heads+neurons", 0.5, rows)
    config = kprune.Config(representational=0.5)
    drawn = [labels for _, labels in rows]
    found = kprune.knowledge(job, rows, drawn, config)
    layer = job.layers[1]
    for part, unit, width, module in (
        ("heads", 2, layer.head_size, layer.attention_output),
        ("neurons", 7, 1, layer.ffn_out),
    ):
        predictive, energy, tokens = 0.0, 0.0, 0
        columns = module.weight.detach()[:, unit * width : (unit + 1) * width]
        for (inputs, _), answers in zip(rows, drawn, strict=True):
            for i in range(len(answers)):
                length = int(inputs["attention_mask"][i].sum())
                one = {k: v[i : i + 1, :length] for k, v in inputs.items()}
                gate = torch.ones((), requires_grad=True)
                seen: list[torch.Tensor] = []
                keep = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                hook = scaled(module, unit, width, gate)
                loss = 4 * F.cross_entropy(made.model(**one).logits / 2, answers[i : i + 1])
                (gradient,) = torch.autograd.grad(loss, gate)
                hook.remove()
                keep.remove()
                predictive += 0.5 * float(gradient) ** 2
                own = seen[0].detach()[0, :, unit * width : (unit + 1) * width]
                energy += float((own @ columns.T).square().sum())
                tokens += length
        expected = predictive / 6 + 0.5 * energy / tokens
        got = (found.heads if part == "heads" else found.neurons)[1][unit]
        assert got == pytest.approx(expected, rel=1e-4)  # float32 gradients and sums


def test_the_mean_square_is_the_second_derivative_of_the_divergence() -> None:
    """The identity that the predictive part rests on, with all answers weighed by their probability."""
    made = tiny.checkpoint()
    inputs, _ = batches(rows=6)[0]
    layer = tiny_layers(made)[0]
    expected = 0.0
    t = 2.0
    with torch.no_grad():
        dense = (made.model(**inputs).logits / t).softmax(-1)
    for answer in range(2):
        for i in range(len(dense)):
            gate = torch.ones((), requires_grad=True)
            hook = scaled(layer.attention_output, 1, layer.head_size, gate)
            loss = F.cross_entropy(made.model(**inputs).logits[i : i + 1] / t, torch.tensor([answer]))
            (gradient,) = torch.autograd.grad(loss, gate)
            hook.remove()
            expected += 0.5 * float(dense[i, answer]) * float(gradient) ** 2
    made.model.double()
    values = []
    for step in (-1e-2, 1e-2):
        hook = scaled(layer.attention_output, 1, layer.head_size, torch.tensor(1 + step, dtype=torch.float64))
        with torch.no_grad():
            now = (made.model(**inputs).logits / t).log_softmax(-1)
        hook.remove()
        with torch.no_grad():
            before = (made.model(**inputs).logits / t).log_softmax(-1)
        values.append(float(F.kl_div(now, before, log_target=True, reduction="sum")) / step**2)
    # The mean of both sides cancels the third order; the fourth is of relative order step^2 = 1e-4.
    assert np.mean(values) == pytest.approx(expected, rel=1e-2)


def tiny_layers(made: Any) -> list[Any]:
    from kdcli.families.stack import encoder_layers

    return encoder_layers(made.model, made.family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_of_the_cost_goes_and_taylor_loses_more(family: str) -> None:
    halves_and_beats_taylor(family, lambda job: kprune.prune(job, CONFIG))


def test_the_refit_takes_over_what_was_cut() -> None:
    """Where all units come in pairs of equals, those that stay can do the work of those that go."""
    dense, made = doubled(), doubled()
    kprune.prune(job_of(made, "neurons", 0.1), CONFIG)
    assert divergence(dense, made, batches(seed=9)) < 1e-4


def test_labels_are_not_read_and_the_seed_decides_the_drawn_answers() -> None:
    states = []
    for flip in (False, True):
        made = tiny.checkpoint()
        rows = [(x, 1 - y if flip else y) for x, y in batches()]
        kprune.prune(job_of(made, "heads+neurons", 0.5, rows), CONFIG)
        states.append(made.model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_nothing_to_remove_changes_nothing() -> None:
    dense, made = tiny.checkpoint(), tiny.checkpoint()
    found = kprune.prune(job_of(made, "heads+neurons", 0.0), CONFIG)
    assert not found.cut.heads
    assert not found.cut.neurons
    assert all(
        torch.equal(a, b)
        for a, b in zip(dense.model.state_dict().values(), made.model.state_dict().values(), strict=True)
    )
