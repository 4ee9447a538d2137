"""A whole encoder, seen through its family: its layers, its residual stream and what stands before and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdcli.families.family import Encoder, Family
from kdcli.families.layer import Layer
from kdcli.families.modules import (
    LowRankEmbedding,
    LowRankLinear,
    Projection,
    keep_columns,
    keep_inputs,
    keep_normalised,
    keep_outputs,
)


def encoder_layers(model: nn.Module, family: Encoder, head_size: int | None = None) -> list[Layer]:
    """Return the encoder layers of a classification model, first to last."""
    size = head_size or head_size_of(model)
    modules = model.get_submodule(family.layers)
    assert isinstance(modules, nn.ModuleList)
    return [Layer(family, index, module, size) for index, module in enumerate(modules)]


def keep_layers(model: nn.Module, family: Encoder, kept: Sequence[int]) -> None:
    """Keep only the given encoder layers of ``model``, in place."""
    modules: Any = model.get_submodule(family.layers)
    model.set_submodule(family.layers, nn.ModuleList(modules[i] for i in kept))


def entrance(model: nn.Module, family: Encoder) -> nn.Module:
    """What writes the residual stream that the first layer reads.

    The layer norm of the embeddings, or, where ELECTRA's embeddings are narrower than its layers, the
    projection between them.
    """
    if family.projection is not None and _has(model, family.projection):
        return model.get_submodule(family.projection)
    return model.get_submodule(f"{family.embeddings}.{family.embeddings_norm}")


def reader(model: nn.Module, family: Encoder) -> Projection:
    """The linear layer that reads the encoder's output of the first token."""
    found = model.get_submodule(family.reader)
    assert isinstance(found, nn.Linear | LowRankLinear)
    return found


def width_of(model: nn.Module, family: Encoder) -> int:
    """D, the features of the residual stream that the model has now; its configuration has those of before."""
    return reader(model, family).in_features


def keep_features(model: nn.Module, family: Encoder, kept: Sequence[int]) -> None:
    """Keep only the given features of the residual stream, in place; heads keep their number and size.

    One index goes through whatever writes the stream (embeddings, output projections), normalises it, or
    reads it (query, key, value, the first feed-forward layer, the first layer of the classification head).
    """
    first: Any = entrance(model, family)
    if isinstance(first, nn.LayerNorm):
        for table in model.get_submodule(family.embeddings).children():
            if isinstance(table, LowRankEmbedding):
                keep_outputs(table.second, kept)
            elif isinstance(table, nn.Embedding):
                keep_columns(table, kept)
        keep_normalised(first, kept)
    else:
        keep_outputs(first, kept)
    for layer in encoder_layers(model, family):
        layer.keep_features(kept)
    keep_inputs(reader(model, family), kept)


def head_size_of(model: nn.Module) -> int:
    """Features of one attention head; surgery removes whole heads, so the configuration stays right."""
    config: Any = model.config
    return int(config.hidden_size) // int(config.num_attention_heads)


def encoder_linears(model: nn.Module, family: Encoder) -> dict[str, nn.Linear]:
    """Return the plain linear layers of the encoder by their full dotted name (factor pairs are left out)."""
    found: dict[str, nn.Linear] = {}
    factors = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for part in ("first", "second")
    }
    for name, module in model.named_modules():
        if name.startswith(family.layers + ".") and isinstance(module, nn.Linear) and name not in factors:
            found[name] = module
    return found


def tables(model: nn.Module, family: Encoder) -> dict[str, Tensor]:
    """The embedding tables of tokens, positions and segments (V, D), by their names inside the embeddings."""
    inside = model.get_submodule(family.embeddings)
    return {name: m.weight.data for name, m in inside.named_children() if isinstance(m, nn.Embedding)}


def head_linears(model: nn.Module, family: Encoder) -> dict[str, nn.Linear]:
    """The plain linear layers behind the encoder by their full dotted name."""
    before = [family.layers, family.embeddings, *([family.projection] if family.projection else [])]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(f"{name}.".startswith(f"{path}.") for path in before)
    }


def logits_layer(model: nn.Module, family: Family) -> nn.Linear | None:
    """The linear layer that gives the logits; None where that is no linear layer, or has another name."""
    found = model.get_submodule(family.logits) if _has(model, family.logits) else None
    return found if isinstance(found, nn.Linear) else None


def is_token_table(name: str) -> bool:
    """Whether an embedding table of that dotted name is read by tokens; biases of relative positions are tables too."""
    return name.endswith("_embeddings")


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
