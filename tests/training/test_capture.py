"""What is read inside a model is what transformers itself shows of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.errors import UsageError
from kdcli.families.stack import encoder_layers
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.transforms import TransformLog
from kdcli.training.capture import Capture, run_cut, shape_of
from kdcli.training.terms import Needs, Shape, Signals
from tests import tiny

LAYERS = 3
EVERYTHING = Needs(True, frozenset(range(LAYERS + 1)), frozenset(range(1, LAYERS + 1)))


def of_another_family(model_type: str, **sizes: Any) -> Checkpoint:
    """A random classifier that is none of the five families."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tok = tiny.tokenizer()
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tok), max_position_embeddings=42, pad_token_id=0, **common, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    return Checkpoint(model, tok, list(tiny.LABELS), TransformLog(), Path("/nonexistent"))


def signals(made: Checkpoint, batch: dict[str, torch.Tensor], needs: Needs, *, cut: bool = False) -> Signals:
    with torch.no_grad(), Capture(made, needs, cut=cut) as capture:
        logits = torch.zeros(())
        if cut:
            run_cut(made.model, batch)
        else:
            logits = made.model(**batch).logits
        return capture.signals(logits, batch["attention_mask"].bool())


def tensors(found: Signals) -> dict[str, torch.Tensor]:
    """Everything but the logits, by name."""
    named = {
        f"{kind}.{layer}": value
        for kind in ("hidden", "query", "key", "value")
        for layer, value in getattr(found, kind).items()
    }
    return named | ({} if found.pooled is None else {"pooled": found.pooled})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_signals_are_what_transformers_shows(family: str) -> None:
    made, batch = tiny.checkpoint(family, layers=LAYERS), tiny.batch(family)
    assert (batch["attention_mask"] == 0).any()
    found = signals(made, batch, EVERYTHING)
    with torch.no_grad():
        reference = made.model(**batch, output_hidden_states=True, output_attentions=True)
    rows, tokens = batch["input_ids"].shape
    assert torch.equal(found.logits, reference.logits)
    assert sorted(found.hidden) == list(range(LAYERS + 1)) == list(range(len(reference.hidden_states)))
    for layer, state in enumerate(reference.hidden_states):
        assert torch.equal(found.hidden[layer], state)
    assert found.pooled is not None
    assert torch.equal(found.pooled, reference.hidden_states[-1][:, 0])
    # MPNet adds a bias by distance to the scores, the same one in every layer; no signal holds it.
    bias: Any = 0.0
    if family == "mpnet":
        bias = made.model.mpnet.encoder.compute_position_bias(reference.hidden_states[0])  # type: ignore[union-attr]
    padded = ~batch["attention_mask"].bool()[:, None, None, :]
    for layer, probabilities in enumerate(reference.attentions, start=1):
        for projected in (found.query[layer], found.key[layer], found.value[layer]):
            assert projected.shape == (rows, 4, tokens, 8)  # B, H, T, E
        scores = found.query[layer] @ found.key[layer].transpose(-1, -2) / 8**0.5 + bias
        got = scores.masked_fill(padded, float("-inf")).softmax(-1)
        assert torch.allclose(got, probabilities, atol=1e-6)  # float32 rounding of probabilities
    # Value: the layer's attention output is what these probabilities make of it.
    layer = encoder_layers(made.model, made.family)[0]
    context = (reference.attentions[0] @ found.value[1]).transpose(1, 2).flatten(2)
    seen: list[torch.Tensor] = []
    handle = layer.attention_output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        made.model(**batch)
    handle.remove()
    assert torch.allclose(context, seen[0], atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("needs", "highest"),
    [
        (Needs(hidden=frozenset({0})), 0),
        (Needs(hidden=frozenset({0, 1})), 1),
        (Needs(hidden=frozenset({1}), attention=frozenset({2})), 2),
        (Needs(pooled=True, attention=frozenset({1})), 3),
    ],
)
def test_a_cut_ends_at_the_highest_layer_and_changes_no_signal(
    family: str, needs: Needs, highest: int
) -> None:
    made, batch = tiny.checkpoint(family, layers=LAYERS), tiny.batch(family)
    whole = tensors(signals(made, batch, needs))
    ran: list[int] = []
    parts = [layer.ffn_in for layer in encoder_layers(made.model, made.family)]
    heads = [m for name, m in made.model.named_modules() if name in ("classifier", "pre_classifier")]
    assert heads
    for number, module in enumerate([*parts, *heads], start=1):
        module.register_forward_hook(lambda *_, number=number: ran.append(number))
    cut = tensors(signals(made, batch, needs, cut=True))
    assert ran == list(range(1, highest + 1))  # neither higher layers nor the head
    assert cut.keys() == whole.keys() != set()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_hooks_are_gone_after_the_block_even_after_an_error() -> None:
    made, batch = tiny.checkpoint(layers=LAYERS), tiny.batch()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.model.modules())

    before = hooks()
    with Capture(made, EVERYTHING, cut=True):
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(RuntimeError, match="in the block"), Capture(made, EVERYTHING):
        raise RuntimeError("in the block")
    assert hooks() == before
    assert made.model(**batch).logits.shape == (5, 2)  # and nothing cuts it any more


def test_nothing_is_hooked_when_nothing_is_needed() -> None:
    made = tiny.checkpoint()
    with Capture(made, Needs(), cut=True) as capture:
        logits = made.model(**tiny.batch()).logits
        found = capture.signals(logits, tiny.batch()["attention_mask"].bool())
    assert found.logits is logits
    assert tensors(found) == {}


def test_signals_are_of_the_latest_pass_and_given_once() -> None:
    made = tiny.checkpoint()
    needs = Needs(pooled=True, hidden=frozenset({1}), attention=frozenset({2}))
    with torch.no_grad(), Capture(made, needs) as capture:
        for seed, rows in ((1, 4), (2, 6)):
            batch = tiny.batch(rows=rows, seed=seed)
            reference = made.model(**batch, output_hidden_states=True)
            found = capture.signals(reference.logits, batch["attention_mask"].bool())
            assert torch.equal(found.hidden[1], reference.hidden_states[1])
            assert len(found.query[2]) == rows
        with pytest.raises(KeyError):  # never those of an older batch
            capture.signals(reference.logits, batch["attention_mask"].bool())


def test_gradients_flow_through_what_is_read_of_a_student() -> None:
    made, batch = tiny.checkpoint(), tiny.batch()
    with Capture(made, Needs(True, frozenset({1}), frozenset({2}))) as capture:
        logits = made.model(**batch).logits
        found = capture.signals(logits, batch["attention_mask"].bool())
    layers = encoder_layers(made.model, made.family)
    for signal, weight in (
        (found.hidden[1], layers[0].ffn_out.weight),
        (found.value[2], layers[1].value.weight),
        (found.pooled, layers[1].ffn_out.weight),
    ):
        assert signal is not None
        (gradient,) = torch.autograd.grad(signal.square().sum(), weight, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "needs",
    [Needs(hidden=frozenset({1})), Needs(attention=frozenset({1})), Needs(pooled=True)],
)
def test_a_model_without_known_layers_is_refused(needs: Needs) -> None:
    made = of_another_family("convbert", embedding_size=32)
    assert shape_of(made) == Shape(layers=0, hidden=32, heads=0, classes=2, pooled=0)
    with pytest.raises(UsageError, match="'convbert' shows no encoder layers"):
        Capture(made, needs)
    with Capture(made, Needs()):  # its answers can be read
        pass


def test_pooled_of_another_family_is_what_its_linear_classifier_reads() -> None:
    made = of_another_family("albert", embedding_size=16)
    assert shape_of(made) == Shape(layers=0, hidden=32, heads=0, classes=2, pooled=32)
    batch = tiny.batch()
    found = signals(made, batch, Needs(pooled=True))
    assert found.pooled is not None
    with torch.no_grad():
        classifier: Any = made.model.classifier
        assert torch.equal(classifier(found.pooled), found.logits)
    with pytest.raises(UsageError, match="'albert' shows no encoder layers"):
        Capture(made, Needs(pooled=True, hidden=frozenset({1})))


def test_a_layer_that_is_not_there_is_refused() -> None:
    for needs in (Needs(hidden=frozenset({3})), Needs(attention=frozenset({1, 3}))):
        with pytest.raises(UsageError, match="layer 3 was asked for, but the model has 2 layers"):
            Capture(tiny.checkpoint(layers=2), needs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_without_heads_has_states_but_no_attention(family: str) -> None:
    made, batch = tiny.checkpoint(family), tiny.batch(family)
    encoder_layers(made.model, made.family)[0].keep_heads([])
    found = signals(made, batch, Needs(hidden=frozenset({1}), attention=frozenset({2})))
    assert found.hidden[1].shape == (*batch["input_ids"].shape, 32)
    with pytest.raises(UsageError, match="layer 1 has no attention heads left"):
        Capture(made, Needs(attention=frozenset({1, 2})))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shape_of_every_family(family: str) -> None:
    for layers, hidden in itertools.product((1, 3), (16, 32)):
        made = tiny.untrained(family, layers=layers, hidden=hidden, heads=2)
        assert shape_of(made) == Shape(layers, hidden, 2, 2, hidden)
