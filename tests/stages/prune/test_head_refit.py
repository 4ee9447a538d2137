"""The linear layers of the head: found in their order, unchanged where nothing changed, better where it did."""

from __future__ import annotations

import pytest

from kdcli.families.stack import encoder_layers
from kdcli.probe.layer_stream import Stream
from kdcli.stages.prune.head_refit import Head
from tests import tiny
from tests.stages.prune.criteria.refitting import batches, divergence

ORDER = {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "electra": ["classifier.dense", "classifier.out_proj"],
    "mpnet": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
}


def refitted(made, rows, spoil, ridge: float):
    """The head as it is fitted after ``spoil`` has changed the encoder; the names of its layers."""
    head = Head(made.model, made.family, rows)
    names = {module: name for name, module in made.model.named_modules()}
    spoil(made)
    layers = encoder_layers(made.model, made.family)
    stream = Stream(made.model, made.family, layers, rows)
    for layer in layers:
        stream.advance(layer)
    head.refit(stream, ridge)
    return [names[module] for module in head.order]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_changed_nothing_fitted(family: str) -> None:
    dense, made, rows = tiny.checkpoint(family), tiny.checkpoint(family), batches(family)
    assert refitted(made, rows, lambda _: None, 1e-3) == ORDER[family]
    # The solution of the normal equations in float64, from sums of float32 products.
    assert divergence(dense, made, rows) < 1e-8


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_head_makes_up_for_a_pruned_encoder(family: str) -> None:
    def spoil(made) -> None:
        encoder_layers(made.model, made.family)[1].keep_neurons(range(16))

    dense, made, left = (tiny.checkpoint(family) for _ in range(3))
    refitted(made, batches(family), spoil, 1e-3)
    spoil(left)
    fresh = batches(family, seed=7)
    assert divergence(dense, made, fresh) < 0.5 * divergence(dense, left, fresh)
