"""Taylor importance against finite differences, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.families.modules import keep_inputs, keep_outputs
from kdcli.families.stack import encoder_layers
from kdcli.stages.prune.criteria import taylor
from tests import tiny

LABELS = torch.tensor([0, 1, 1, 0, 1])


def setting(family: str = "bert", seed: int = 0, **sizes: int):
    made = tiny.checkpoint(family, seed=seed, **sizes)
    return made.model, encoder_layers(made.model, made.family), tiny.batch(family)


def losses(model, inputs, labels=LABELS) -> torch.Tensor:
    return F.cross_entropy(model(**inputs).logits, labels, reduction="none")


@torch.no_grad()
def scaled_losses(model, module, unit: int, width: int, factor: float, inputs) -> torch.Tensor:
    """Losses (B,) with ``width`` features of one unit multiplied by ``factor``; no gates, no gradients."""

    def hook(_, args):
        x = args[0].clone()
        x[..., unit * width : (unit + 1) * width] *= factor
        return (x,)

    handle = module.register_forward_pre_hook(hook)
    try:
        return losses(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gate_gradients_are_central_differences_row_by_row(family: str) -> None:
    model, layers, inputs = setting(family)
    model.double()  # the gates stay float32, so a gradient is good to a relative 1e-7
    with taylor.gated(layers, 5) as gates:
        found = taylor.gradients(losses(model, inputs).sum(), gates)
    step = 1e-4
    for layer in layers:
        for module, width, units, grads in (
            (layer.attention_output, layer.head_size, range(layer.heads), found.heads[layer.index]),
            (layer.ffn_out, 1, range(0, layer.neurons, 7), found.neurons[layer.index]),
        ):
            for unit in units:
                up, down = (scaled_losses(model, module, unit, width, 1 + s, inputs) for s in (step, -step))
                expected = (up - down) / (2 * step)
                # The truncation error of a central difference is of order step^2 = 1e-8 times L'''.
                assert torch.allclose(grads[:, unit].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", ["absolute", "squared"])
def test_importance_sums_rows_and_not_batches(score: taylor.Score) -> None:
    model, layers, inputs = setting()
    whole, loss = taylor.importance(model, layers, [(inputs, LABELS)], score)
    # Row by row, without padding, one backward pass each.
    singles = []
    for i in range(5):
        width = int(inputs["attention_mask"][i].sum())
        singles.append(({k: v[i : i + 1, :width] for k, v in inputs.items()}, LABELS[i : i + 1]))
    single, single_loss = taylor.importance(model, layers, singles, score)
    np.testing.assert_allclose(whole.flat(), single.flat(), rtol=1e-3, atol=1e-6)
    assert loss == pytest.approx(single_loss, rel=1e-5)
    with taylor.gated(layers, 5) as gates:
        grads = taylor.gradients(losses(model, inputs).sum(), gates)
    rows = grads.heads[1].double().numpy()
    expected = np.abs(rows).sum(0) if score == "absolute" else (rows**2).sum(0)
    np.testing.assert_allclose(whole.heads[1], expected, rtol=1e-5)
    # A sum of signed gradients would be another number: rows of opposite sign must not cancel.
    assert not np.allclose(expected, np.abs(rows.sum(0)), rtol=0.05)


def test_gates_of_ones_change_nothing_and_leave_nothing() -> None:
    model, layers, inputs = setting()
    model.get_submodule("classifier").weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = losses(model, inputs)
    with taylor.gated(layers, 5):
        assert torch.equal(losses(model, inputs), before)

    def broken():
        yield inputs, LABELS
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        taylor.importance(model, layers, broken(), "squared")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_without_units_have_empty_scores() -> None:
    model, layers, inputs = setting()
    layers[0].keep_heads([])
    layers[1].keep_neurons([])
    found, _ = taylor.importance(model, layers, [(inputs, LABELS)], "squared")
    assert [len(x) for x in found.heads] == [0, 4]
    assert [len(x) for x in found.neurons] == [48, 0]
    assert found.heads[1].all()


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_scores_follow_a_permutation_of_the_units(family: str) -> None:
    model, layers, inputs = setting(family)
    plain, _ = taylor.importance(model, layers, [(inputs, LABELS)], "squared")
    layer, heads = layers[0], [2, 0, 3, 1]
    neurons = torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist()
    columns = [h * layer.head_size + i for h in heads for i in range(layer.head_size)]
    for projection in (layer.query, layer.key, layer.value):
        keep_outputs(projection, columns)
    keep_inputs(layer.attention_output, columns)
    keep_outputs(layer.ffn_in, neurons)
    keep_inputs(layer.ffn_out, neurons)
    moved, _ = taylor.importance(model, layers, [(inputs, LABELS)], "squared")
    np.testing.assert_allclose(moved.heads[0], plain.heads[0][heads], rtol=1e-3)
    np.testing.assert_allclose(moved.neurons[0], plain.neurons[0][neurons], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(moved.heads[1], plain.heads[1], rtol=1e-3)


def test_finds_a_head_that_the_magnitude_of_its_output_weights_would_drop() -> None:
    model, layers, inputs = setting()
    layer, size = layers[0], layers[0].head_size
    with torch.no_grad():
        # Head 0 speaks loudly through small output weights; the others hardly speak through large ones.
        layer.value.weight[:size] *= 40
        layer.attention_output.weight[:, :size] *= 0.2
        layer.value.weight[size:] *= 0.01
        layer.value.bias[size:] *= 0.01
        layer.attention_output.weight[:, size:] *= 2
        norms = layer.attention_output.weight.reshape(-1, 4, size).square().sum((0, 2))
    found, _ = taylor.importance(model, layers, [(inputs, LABELS)], "squared")
    with torch.no_grad():
        dense = losses(model, inputs)
    without = [scaled_losses(model, layer.attention_output, h, size, 0.0, inputs) for h in range(4)]
    harm = [float((loss - dense).abs().sum()) for loss in without]
    assert int(norms.argmin()) == 0
    assert int(np.argmax(harm)) == 0
    assert int(np.argmax(found.heads[0])) == 0
