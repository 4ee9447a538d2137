"""Surgery on every family: what is masked and what is cut must answer alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcli.errors import InputError
from kdcli.models import transforms
from kdcli.models.families import encoder_layers, encoder_linears, family_of
from kdcli.models.transforms import Cut
from tests import tiny

# float32 sums in another order; logits are of order 1.
TOLERANCE = 1e-5


def masked_logits(made, inputs, heads, neurons):
    """Logits with the given units' outputs set to zero by hooks, nothing removed."""
    hooks = []
    for layer in encoder_layers(made.model, made.family):
        head_mask = torch.ones(layer.heads).index_fill(
            0, torch.tensor(heads[layer.index], dtype=torch.long), 0.0
        )
        neuron_mask = torch.ones(layer.neurons).index_fill(
            0, torch.tensor(neurons[layer.index], dtype=torch.long), 0.0
        )
        for module, mask in (
            (layer.attention_output, head_mask.repeat_interleave(layer.head_size)),
            (layer.ffn_out, neuron_mask),
        ):
            hooks.append(module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    with torch.no_grad():
        logits = made.model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits


def cut_of(made, heads, neurons):
    layers = encoder_layers(made.model, made.family)
    return Cut(
        heads={x.index: [h for h in range(x.heads) if h not in heads[x.index]] for x in layers},
        neurons={x.index: [n for n in range(x.neurons) if n not in neurons[x.index]] for x in layers},
    )


CASES = {
    "uneven": ([[1], [0, 3]], [[0, 5, 6], list(range(40))]),
    "no head left": ([[0, 1, 2, 3], [2]], [[], [1]]),
    "no neuron left": ([[], [0]], [list(range(48)), []]),
    "nothing left": ([[0, 1, 2, 3]] * 2, [list(range(48))] * 2),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_masked_and_cut_model_agree_and_reload(family: str, case: str, tmp_path: Path) -> None:
    heads, neurons = CASES[case]
    made, inputs = tiny.checkpoint(family), tiny.batch(family)
    expected = masked_logits(made, inputs, heads, neurons)
    cut = cut_of(made, heads, neurons)
    with torch.no_grad():
        dense = made.model(**inputs).logits
    transforms.apply(made.model, cut)
    made.log.transforms.append(cut)
    with torch.no_grad():
        got = made.model(**inputs).logits
    assert torch.allclose(got, expected, atol=TOLERANCE)
    assert not torch.allclose(got, dense, atol=1e-3)  # something was really removed
    again = tiny.reload(made, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, got)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cut_model_can_be_cut_again(family: str, tmp_path: Path) -> None:
    made, inputs = tiny.checkpoint(family), tiny.batch(family)
    for cut in (
        Cut(heads={0: [0, 2, 3]}, neurons={1: list(range(0, 48, 2))}),
        Cut(heads={0: [1]}, neurons={1: [0, 1, 9]}),
    ):
        transforms.apply(made.model, cut)
        made.log.transforms.append(cut)
    # One cut with the composed indices gives the same model.
    once = tiny.checkpoint(family)
    transforms.apply(once.model, Cut(heads={0: [2]}, neurons={1: [0, 2, 18]}))
    with torch.no_grad():
        got = made.model(**inputs).logits
        assert torch.allclose(got, once.model(**inputs).logits, atol=TOLERANCE)
        assert torch.equal(tiny.reload(made, tmp_path / "out").model(**inputs).logits, got)


def test_even_neurons_move_into_the_configuration(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made, inputs = tiny.checkpoint(), tiny.batch()
    cut = Cut(neurons={0: list(range(16)), 1: list(range(8, 24))})
    transforms.apply(made.model, cut)
    made.log.transforms.append(cut)
    again = tiny.reload(made, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, again.model(**inputs).logits, atol=TOLERANCE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_factorised_and_cut_layer_can_be_cut(family: str) -> None:
    made, inputs = tiny.checkpoint(family), tiny.batch(family)
    fam = made.family
    for name, linear in encoder_linears(made.model, fam).items():
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        pair = transforms.factorise(made.model, name, len(s))  # full rank: nothing is lost
        with torch.no_grad():
            pair.second.weight.copy_(u * s)
            pair.first.weight.copy_(v)
            if bias is not None:
                pair.second.bias.copy_(bias)
    plain = tiny.checkpoint(family)
    for one in (made, plain):
        transforms.apply(one.model, Cut(heads={0: [3, 1]}, neurons={1: [4, 5]}))
    with torch.no_grad():
        assert torch.allclose(made.model(**inputs).logits, plain.model(**inputs).logits, atol=1e-4)


def test_unknown_family_is_an_input_error() -> None:
    with pytest.raises(InputError, match="type 'xlnet'"):
        family_of("xlnet")


def test_a_log_of_another_model_is_an_input_error() -> None:
    made = tiny.checkpoint()
    for wrong in (
        Cut(heads={7: [0]}),
        Cut(neurons={0: [99]}),
        transforms.Factorise(ranks={"bert.nowhere": 3}),
    ):
        with pytest.raises(InputError):
            transforms.apply(made.model, wrong)
