"""A model run layer by layer gives what it gives as a whole, for every family, also where parts are gone."""

from __future__ import annotations

import pytest
import torch

from kdcli.families.stack import encoder_layers, encoder_linears
from kdcli.models import transforms
from kdcli.probe.layer_stream import PARTS, Pair, Stream
from kdcli.probe.raw_moments import RawMoments
from kdcli.stages.prune.sublayer_refit import cut, replaced
from tests import tiny

# float32 sums in another order; states and logits are of order 1.
TOLERANCE = 1e-5


def setting(family: str = "bert", state: str = "dense"):
    made = tiny.checkpoint(family)
    layers = encoder_layers(made.model, made.family)
    if state == "emptied":
        layers[0].keep_heads([])
        layers[1].keep_neurons([])
    if state == "factorised":
        for name in encoder_linears(made.model, made.family):
            transforms.factorise(made.model, name, 9)
    inputs = tiny.batch(family)
    return made, layers, [(inputs, torch.zeros(len(inputs["input_ids"]), dtype=torch.long))]


@torch.no_grad()
def logits(made, batches) -> torch.Tensor:
    return made.model(**batches[0][0]).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("state", ["dense", "emptied", "factorised"])
def test_layer_by_layer_is_the_whole_model(family: str, state: str) -> None:
    made, layers, batches = setting(family, state)
    stream = Stream(made.model, made.family, layers, batches)
    for layer in layers:
        (found,) = stream.logits(layer.index)
        torch.testing.assert_close(found, logits(made, batches), atol=TOLERANCE, rtol=0)
        stream.advance(layer)
    (found,) = stream.logits(len(layers))
    torch.testing.assert_close(found, logits(made, batches), atol=TOLERANCE, rtol=0)
    assert len(made.model.get_submodule(made.family.layers)) == 2  # and is whole again


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("state", ["dense", "emptied", "factorised"])
def test_a_probe_has_what_the_layer_norm_gets(family: str, state: str) -> None:
    made, layers, batches = setting(family, state)
    norms: list[torch.Tensor] = []
    for layer in layers:
        for module in layer.module.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, args: norms.append(args[0]))
    stream = Stream(made.model, made.family, layers, batches)
    for layer in layers:
        norms.clear()
        found, output = stream.visit(layer, 0)
        for part, expected in zip(PARTS, norms, strict=True):
            torch.testing.assert_close(found[part].total, expected, atol=TOLERANCE, rtol=0)
            units = layer.heads * layer.head_size if part == "heads" else layer.neurons
            assert found[part].features.shape[-1] == units
        torch.testing.assert_close(output, stream.call(layer, 0))
        alone, nothing = stream.visit(layer, 0, ("heads",))
        torch.testing.assert_close(alone["heads"].total, found["heads"].total)
        assert nothing is None
        stream.advance(layer)


def gathered(pair: Pair, index: int, part: str) -> RawMoments:
    for before in range(index):
        pair.enter(before)
        pair.leave(before)
    pair.enter(index)
    return pair.moments(index, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("index", [0, 1])
def test_padding_changes_no_moment(part: str, index: int) -> None:
    made, layers, batches = setting()
    inputs, labels = batches[0]
    wider = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in inputs.items()}
    found = gathered(Pair(made.model, made.family, layers, batches), index, part)
    padded = gathered(Pair(made.model, made.family, layers, [(wider, labels)]), index, part)
    # Sums of about 40 products of order 1 in float32.
    torch.testing.assert_close(found.hh, padded.hh, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.ht, padded.ht, atol=1e-3, rtol=1e-4)
    tokens = int(inputs["attention_mask"].sum())
    rows = len(labels)
    expected = tokens if index == 0 else rows + 0.1 * (tokens - rows)  # the last layer is read at one token
    assert found.count == pytest.approx(padded.count) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_an_unpruned_sub_layer_meets_its_target_and_keeps_its_weights(part: str) -> None:
    made, layers, batches = setting()
    before = logits(made, batches)
    moments = gathered(Pair(made.model, made.family, layers, batches), 0, part)
    units = range(layers[0].heads if part == "heads" else layers[0].neurons)
    error = cut(layers[0], part, list(units), moments, 1e-3)
    assert error < 1e-6  # of the targets' variance
    torch.testing.assert_close(logits(made, batches), before, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_an_emptied_sub_layer_gives_the_dense_mean(family: str, part: str) -> None:
    made, layers, batches = setting(family)
    pair = Pair(made.model, made.family, layers, batches)
    pair.enter(0)
    cut(layers[0], part, [], pair.moments(0, part), 1e-3)
    mask = batches[0][0]["attention_mask"].bool()
    fresh, dense_layers, _ = setting(family)
    dense = Stream(fresh.model, fresh.family, dense_layers, batches).visit(dense_layers[0], 0)[0][part]
    now = pair.pruned.visit(layers[0], 0)[0][part]
    wanted = (dense.total - dense.residual)[mask].mean(0)
    got = (now.total - now.residual)[mask]
    torch.testing.assert_close(got, wanted.expand_as(got), atol=1e-4, rtol=0)


def test_a_replaced_projection_is_the_cut_one_with_those_weights() -> None:
    made, layers, batches = setting()
    layer = layers[1]
    weight, bias = torch.zeros(32, 48, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    weight[:, :5] = layer.ffn_out.weight.detach()[:, :5].double()
    with replaced(layer, "neurons", weight, bias):
        found = logits(made, batches)
    assert not torch.allclose(found, logits(made, batches), atol=1e-2)  # only inside
    layer.keep_neurons(range(5))
    with torch.no_grad():
        layer.ffn_out.bias.fill_(1.0)
    torch.testing.assert_close(found, logits(made, batches), atol=TOLERANCE, rtol=0)
