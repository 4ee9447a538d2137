"""Surgery on every family: what is masked and what is cut must answer alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcli import families
from kdcli.errors import InputError
from kdcli.families import stack
from kdcli.families.stack import encoder_layers, encoder_linears
from kdcli.models import transforms
from kdcli.models.checkpoint import fresh
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
        families.of("xlnet")


def test_a_log_of_another_model_is_an_input_error() -> None:
    made = tiny.checkpoint()
    for wrong in (
        Cut(heads={7: [0]}),
        Cut(neurons={0: [99]}),
        transforms.Factorise(ranks={"bert.nowhere": 3}),
    ):
        with pytest.raises(InputError):
            transforms.apply(made.model, wrong)


def skipping(made, gone: list[int]):
    """Make the given layers hand on what they were given; returns the hooks."""
    layers = encoder_layers(made.model, made.family)
    hooks = []
    for index in gone:
        # BERT's layers return a tensor, MPNet's a tuple.
        def skip(_, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            return (given, *output[1:]) if isinstance(output, tuple) else given

        hooks.append(layers[index].module.register_forward_hook(skip, with_kwargs=True))
    return hooks


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_masked_and_dropped_layers_agree_and_plain_transformers_loads_them(
    family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    made, inputs = tiny.checkpoint(family, layers=4), tiny.batch(family)
    hooks = skipping(made, [0, 2])
    with torch.no_grad():
        expected = made.model(**inputs).logits
        for hook in hooks:
            hook.remove()
        dense = made.model(**inputs).logits
    drop = transforms.Layers(keep=[1, 3])
    transforms.apply(made.model, drop)
    made.log.transforms.append(drop)
    with torch.no_grad():
        got = made.model(**inputs).logits
    assert torch.allclose(got, expected, atol=TOLERANCE)
    assert not torch.allclose(got, dense, atol=1e-3)
    again = tiny.reload(made, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, got)
        # The reference has another kernel for attention.
        assert torch.allclose(plain(**inputs).logits, got, atol=TOLERANCE)
    assert again.config.num_hidden_layers == plain.config.num_hidden_layers == 2
    # A transform after it counts the layers that are left, also when the file is read again.
    for one in (made, again):
        cut = Cut(heads={1: [0, 3]}, neurons={0: [5]})
        transforms.apply(one.model, cut)
        one.log.transforms.append(cut)
    with torch.no_grad():
        got = made.model(**inputs).logits
        assert torch.equal(tiny.reload(again, tmp_path / "again").model(**inputs).logits, got)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_go_after_heads_too(family: str, tmp_path: Path) -> None:
    made, inputs = tiny.checkpoint(family, layers=3), tiny.batch(family)
    for one in (Cut(heads={2: [1], 0: []}, neurons={2: []}), transforms.Layers(keep=[0, 2])):
        transforms.apply(made.model, one)
        made.log.transforms.append(one)
    assert [layer.heads for layer in encoder_layers(made.model, made.family)] == [0, 1]
    with torch.no_grad():
        got = made.model(**inputs).logits
        again = tiny.reload(made, tmp_path / "out")
        assert torch.equal(again.model(**inputs).logits, got)
    assert again.config.num_hidden_layers == 3  # what the log starts from


def narrow_by_zeros(made, kept: list[int]) -> None:
    """Zero what is cut, and let every layer norm see the kept features alone; shapes stay."""
    width = stack.width_of(made.model, made.family)
    mask = torch.zeros(width)
    mask[kept] = 1
    for module in made.model.modules():
        if isinstance(module, torch.nn.LayerNorm) and module.normalized_shape == (width,):

            def over_kept(norm, args, _):
                out = torch.zeros_like(args[0])
                part = args[0][..., kept]
                mean, variance = part.mean(-1, keepdim=True), part.var(-1, keepdim=True, correction=0)
                normed = (part - mean) / (variance + norm.eps).sqrt()
                out[..., kept] = normed * norm.weight[kept] + norm.bias[kept]
                return out

            module.register_forward_hook(over_kept)
    entrance = stack.entrance(made.model, made.family)
    if not isinstance(entrance, torch.nn.LayerNorm):
        entrance.register_forward_hook(lambda _, args, output: output * mask)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra with a projection"])
@pytest.mark.parametrize("emptied", [False, True])
def test_narrowed_model_is_the_one_whose_norms_see_the_kept_features_alone(
    family: str, emptied: bool, tmp_path: Path
) -> None:
    def make():
        if family in tiny.FAMILIES:
            return tiny.checkpoint(family)
        made = tiny.checkpoint("electra")
        config = made.config
        config.embedding_size = 12
        torch.manual_seed(0)
        made.model = fresh(config).eval()
        with torch.no_grad():
            for parameter in made.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.25)
        return made

    kept = [0, 1, 3, 4, 7, 9, 12, 20, 21, 30, 31]
    first, inputs = make(), tiny.batch(family.split()[0])
    made = make()
    width = transforms.Width(keep=kept)
    emptying = [Cut(heads={0: []}, neurons={1: []})] if emptied else []
    for one in emptying:
        transforms.apply(first.model, one)
    narrow_by_zeros(first, kept)
    for one in [*emptying, width]:
        transforms.apply(made.model, one)
        made.log.transforms.append(one)
    with torch.no_grad():
        expected, got = first.model(**inputs).logits, made.model(**inputs).logits
        assert torch.allclose(got, expected, atol=TOLERANCE)
        again = tiny.reload(made, tmp_path / "out")
        assert torch.equal(again.model(**inputs).logits, got)
    assert stack.width_of(again.model, again.family) == len(kept)
    assert stack.head_size_of(again.model) == 8  # of 4 heads, as before


@pytest.mark.parametrize(
    "wrong",
    [
        transforms.Layers(keep=[]),
        transforms.Layers(keep=[0, 2]),
        transforms.Width(keep=[0, 0]),
        transforms.Width(keep=[40]),
    ],
)
def test_layers_and_features_that_are_not_there_are_input_errors(wrong) -> None:
    with pytest.raises(InputError, match="does not have"):
        transforms.apply(tiny.checkpoint().model, wrong)
