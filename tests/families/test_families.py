"""Every family's views against the modules that transformers has, spelled out once more here."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from kdcli import families
from kdcli.errors import InputError
from kdcli.families import positions, stack
from kdcli.families.family import Encoder
from kdcli.families.layer import Layer
from kdcli.models.aliases import SMALL_STUDENTS
from kdcli.models.checkpoint import fresh
from tests import tiny

FOLDER = Path(families.__file__).parent


def test_every_file_of_the_folder_is_a_family_or_a_part() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert files >= families.PARTS
    declared = {family.name.removeprefix("kdcli-").replace("-", "_") for family in families.every().values()}
    assert files - families.PARTS == declared
    assert set(families.encoders()) == set(tiny.FAMILIES)
    assert {f"kdcli-{kind}" for kind in SMALL_STUDENTS} < set(families.every())


def test_of_says_what_else_can_be_done() -> None:
    with pytest.raises(InputError, match="no heads") as caught:
        families.of("kdcli-cnn")
    assert "tucker2" in str(caught.value.hint)
    assert "static-64" in str(caught.value.hint)
    with pytest.raises(InputError, match=r"it knows bert, distilbert, electra, mpnet, roberta$"):
        families.of("kdcli-ensemble")
    assert families.find("xlnet") is None
    assert families.presumed("xlnet").logits == "classifier"


def spelled(family: str, model):
    """Of the second layer: query, key, value, output, both feed-forward layers, both norms; then what is around."""
    if family == "distilbert":
        base, layer = model.distilbert, model.distilbert.transformer.layer[1]
        own = layer.attention
        heads = (own.q_lin, own.k_lin, own.v_lin, own.out_lin)
        rest = (layer.ffn.lin1, layer.ffn.lin2, layer.sa_layer_norm, layer.output_layer_norm)
        return base, heads, rest, model.pre_classifier, ["pre_classifier", "classifier"]
    base = getattr(model, family)
    layer = base.encoder.layer[1]
    rest = (layer.intermediate.dense, layer.output.dense)
    if family == "mpnet":
        own = layer.attention.attn
        heads, norm = (own.q, own.k, own.v, own.o), layer.attention.LayerNorm
    else:
        own = layer.attention.self
        heads = (own.query, own.key, own.value, layer.attention.output.dense)
        norm = layer.attention.output.LayerNorm
    if family == "bert":
        reader, head = model.bert.pooler.dense, ["bert.pooler.dense", "classifier"]
    else:
        reader, head = model.classifier.dense, ["classifier.dense", "classifier.out_proj"]
    return base, heads, (*rest, norm, layer.output.LayerNorm), reader, head


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_views_are_the_modules_of_transformers(family: str) -> None:
    made = tiny.checkpoint(family)
    base, heads, rest, reader, head = spelled(family, made.model)
    layer = stack.encoder_layers(made.model, made.family)[1]
    assert [layer.query, layer.key, layer.value, layer.attention_output] == list(heads)
    assert [layer.ffn_in, layer.ffn_out, layer.attention_norm, layer.ffn_norm] == list(rest)
    assert stack.reader(made.model, made.family) is reader
    assert stack.entrance(made.model, made.family) is base.embeddings.LayerNorm
    assert list(stack.head_linears(made.model, made.family)) == head
    tables = stack.tables(made.model, made.family)
    assert torch.equal(tables[made.family.token_table], made.model.get_input_embeddings().weight)
    assert made.model.get_submodule(made.family.tokens) is made.model.get_input_embeddings()
    assert (layer.heads, layer.neurons, layer.head_size) == (4, 48, 8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_blank_one_has_the_sizes_that_were_asked_for(family: str) -> None:
    own = families.of(family)
    config = AutoConfig.for_model(family, **own.sizes(3, 24, 4), vocab_size=50, max_position_embeddings=20)
    model = fresh(config)
    layers = stack.encoder_layers(model, own)
    assert (len(layers), stack.width_of(model, own)) == (3, 24)
    assert {(layer.heads, layer.neurons, layer.head_size) for layer in layers} == {(4, 96, 6)}
    assert isinstance(stack.entrance(model, own), nn.LayerNorm)  # embeddings as wide as the layers


# An ensemble's members say it.
@pytest.mark.parametrize("name", sorted(set(families.every()) - {"kdcli-ensemble"}))
def test_weights_are_those_of_a_model_that_is_built(name: str) -> None:
    """``inspect`` and the safety check tell a model's size from its configuration alone."""
    family = families.every()[name]
    own = family.sizes(2, 16, 2) if isinstance(family, Encoder) else {"hidden_size": 16}
    config = AutoConfig.for_model(name, **own, vocab_size=30, max_position_embeddings=20, num_labels=3)
    model = fresh(config)
    roles = ("hidden", "layers", "neurons")
    sizes = {role: int(getattr(config, family.keys.of(role), 0) or 0) for role in roles}
    # Matrices and kernels, but for tables, the head and MPNet's biases of positions.
    left_out = ("embeddings", "classifier", "pooler", "relative_attention_bias")
    inside = [p for n, p in model.named_parameters() if p.ndim > 1 and not any(x in n for x in left_out)]
    assert family.weights(sizes, config.to_dict()) == sum(math.prod(p.shape) for p in inside)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_start_where_the_model_starts_them(family: str) -> None:
    """Rows that no position uses are found by their gradients: a text as long as may be reaches all others."""
    made = tiny.checkpoint(family)
    (rows, before), *more = positions.tables(made.model)
    assert not more
    assert (before > 0) == made.family.positions_after_padding
    longest = rows - before
    ids = torch.full((1, longest), int(made.config.vocab_size) - 1)
    made.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    table = next(p for n, p in made.model.named_parameters() if n.endswith("position_embeddings.weight"))
    assert torch.equal(table.grad.abs().sum(1) > 0, torch.arange(rows) >= before)
    assert made.max_length <= longest


def test_one_layer_that_is_query_key_and_value_has_its_heads_in_three_blocks() -> None:
    class Fused(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 3 * 4 * heads), nn.Linear(4 * heads, 12)

        def forward(self, x, mask=None):
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            mixed = mixed if mask is None else mixed * mask[:, None, None]
            return self.out(mixed.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    module = Fused(3)
    paths = {"query": "qkv", "key": "qkv", "value": "qkv", "attention_output": "out", "attention": ""}
    layer = Layer(SimpleNamespace(**paths, shared_head_bias=False), 0, module, 4)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 12)
    expected = module(x, torch.tensor([1.0, 0.0, 1.0]))
    assert layer.heads == 3
    layer.keep_heads([0, 2])
    assert layer.heads == 2
    assert module.qkv.weight.shape == (24, 12)
    # float32 sums in another order; values are of order 1.
    assert torch.allclose(module(x), expected, atol=1e-6)
