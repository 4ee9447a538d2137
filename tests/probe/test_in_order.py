"""The order of a model's layers, and what they read behind replaced ones, against plain runs of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdcli.probe import in_order
from tests import tiny
from tests.models.test_small import made as small

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 42,
}
OTHERS = {
    "modernbert": {"global_attn_every_n_layers": 2, "pad_token_id": 0, "local_attention": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    "albert": {"embedding_size": 16},
}


def model_of(kind: str) -> nn.Module:
    if kind in tiny.FAMILIES:
        return tiny.checkpoint(kind, layers=3).model
    if kind in OTHERS:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        torch.manual_seed(0)
        made: Any = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(kind, **SIZES | OTHERS[kind])
        )
        return made.eval()
    return small(kind).model


def linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    family = kind if kind in tiny.FAMILIES else "bert"
    made = [tiny.batch(family, rows, width) for rows, width in ((3, 7), (2, 9))]
    return [
        {name: t for name, t in batch.items() if kind in tiny.FAMILIES or name != "token_type_ids"}
        for batch in made
    ]


@torch.no_grad()
def read_in_whole_runs(
    model: nn.Module, layer: nn.Module, rows: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    total = torch.zeros(layer.in_features, layer.in_features)

    def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        total.add_(x.T @ x)

    handle = layer.register_forward_pre_hook(add)
    for batch in rows:
        model(**batch)
    handle.remove()
    return total


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_come_as_they_run_and_those_that_read_one_tensor_together(family: str) -> None:
    model = model_of(family)
    order = in_order.order_of(model, linear(model), batches(family)[0])
    assert len(order.blocks) == 3
    sizes = [(group.block, len(group.names)) for group in order.groups]
    inside = [(block, count) for block in range(3) for count in (3, 1, 1, 1)]
    assert sizes[: len(inside)] == inside
    assert all(block == 3 for block, _ in sizes[len(inside) :])
    assert all(group.once for group in order.groups)
    assert sorted(name for group in order.groups for name in group.names) == sorted(linear(model))


def test_a_model_without_a_stack_of_blocks_has_an_order_too() -> None:
    model = model_of("albert")  # one block that runs three times
    order = in_order.order_of(model, linear(model), batches("albert")[0])
    assert order.blocks == []
    assert not any(g.once for g in order.groups if ".albert_layers." in g.names[0])
    assert {name for group in order.groups for name in group.names} == set(linear(model))


@pytest.mark.parametrize("kind", [*tiny.FAMILIES, *OTHERS, "cnn", "static", "bilstm"])
def test_every_layer_is_seen_behind_the_replaced_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_order.mapped, "LARGE", 2000)  # states of a few bytes go into a file
    model, rows = model_of(kind), batches(kind)
    layers = linear(model)
    order = in_order.order_of(model, layers, rows[0])
    walk = in_order.Walk(model, order, lambda: rows)
    untouched = {name: read_in_whole_runs(model, layer, rows) for name, layer in layers.items()}
    moved = 0
    for group in order.groups:
        found = walk.products(group, layers)
        for name in group.names:
            want = read_in_whole_runs(model, layers[name], rows)
            # float32 sums of at most 39 tokens in another order
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
            moved += not torch.allclose(want, untouched[name], rtol=1e-2)
        with torch.no_grad():
            for name in group.names:
                layers[name].weight.mul_(0.5)
    if kind in (*tiny.FAMILIES, "modernbert", "deberta-v2"):
        assert moved >= len(layers) - 4  # all but those of the first block that read the embeddings


def test_nothing_of_the_model_is_changed() -> None:
    model, rows = model_of("bert"), batches("bert")
    with torch.no_grad():
        before = model(**rows[0]).logits
    order = in_order.order_of(model, linear(model), rows[0])
    walk = in_order.Walk(model, order, lambda: rows)
    for group in order.groups:
        walk.products(group, linear(model))
    with torch.no_grad():
        assert torch.equal(model(**rows[0]).logits, before)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_what_is_needed_runs() -> None:
    """Between blocks states are kept: a block runs five times at most, once for each group and once to pass it."""
    model, rows = model_of("bert"), batches("bert")[:1]
    order = in_order.order_of(model, linear(model), rows[0])
    blocks = [block.module for block in order.blocks]
    runs = [0] * len(blocks)
    # Skipped blocks compute nothing: what counts is how often a part of them does.
    for at, block in enumerate(blocks):
        part = block.attention.self.query

        def count(*_: object, at: int = at) -> None:
            runs[at] += 1

        part.register_forward_pre_hook(count)
    walk = in_order.Walk(model, order, lambda: rows)
    for group in order.groups:
        walk.products(group, linear(model))
    assert runs == [5, 5, 5]
