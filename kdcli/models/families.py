"""Where each architecture keeps its heads and neurons, and how to take some of them out.

transformers 5 has neither head masks nor head pruning, so the surgery lives here. It rests on one
property that all five families share: attention reshapes its projections to ``(B, T, -1, head_size)``,
so fewer rows in query, key and value simply are fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.models.aliases import SMALL_STUDENTS
from kdcli.models.layers import (
    BiasOnly,
    EmptyAttention,
    FirstFeature,
    LowRankEmbedding,
    LowRankLinear,
    Projection,
    keep_columns,
    keep_inputs,
    keep_normalised,
    keep_outputs,
)


@dataclass(frozen=True)
class Family:
    """Dotted paths of one architecture, relative to the classification model or to one encoder layer."""

    name: str
    base: str
    layers: str
    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    attention_norm: str
    ffn_norm: str
    #: The first linear layer after the encoder, relative to the model; it reads the first token.
    reader: str
    ffn_size_key: str = "intermediate_size"
    #: MPNet adds one bias a head to the scores, shared by all layers: a layer must pick its own heads' part.
    shared_head_bias: bool = False


def _bert_like(name: str, reader: str) -> Family:
    return Family(
        name=name,
        base=name,
        layers=f"{name}.encoder.layer",
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention_norm="attention.output.LayerNorm",
        ffn_norm="output.LayerNorm",
        reader=reader,
    )


FAMILIES: dict[str, Family] = {
    "bert": _bert_like("bert", "bert.pooler.dense"),
    "roberta": _bert_like("roberta", "classifier.dense"),
    "electra": _bert_like("electra", "classifier.dense"),
    "distilbert": Family(
        name="distilbert",
        base="distilbert",
        layers="distilbert.transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention_norm="sa_layer_norm",
        ffn_norm="output_layer_norm",
        reader="pre_classifier",
        ffn_size_key="hidden_dim",
    ),
    "mpnet": Family(
        name="mpnet",
        base="mpnet",
        layers="mpnet.encoder.layer",
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention_norm="attention.LayerNorm",
        ffn_norm="output.LayerNorm",
        reader="classifier.dense",
        shared_head_bias=True,
    ),
}


def family_of(model_type: str) -> Family:
    """Return the family of a ``config.json`` ``model_type``.

    Raises:
        InputError: kdcli cannot operate on this architecture.
    """
    if model_type.removeprefix("kdcli-") in SMALL_STUDENTS:
        raise InputError(
            f"a model of type '{model_type}' has no heads, neurons or encoder matrices that kdcli could take out",
            "make it smaller by kdcli prune --structure vocab, by kdcli quantize, or by another width, such as "
            "--student static-64"
            + ("; its convolutions by kdcli lowrank --method tucker2" if model_type == "kdcli-cnn" else ""),
        )
    if model_type not in FAMILIES:
        raise InputError(
            f"kdcli cannot operate on models of type '{model_type}'; it knows {', '.join(sorted(FAMILIES))}",
            "such a model can be the teacher (kdcli distill --teacher MODEL --student tiny), be quantised "
            "(kdcli quantize MODEL), or lose tokens (kdcli prune MODEL --structure vocab)",
        )
    return FAMILIES[model_type]


@dataclass
class Layer:
    """One encoder layer, seen through its family: H heads of ``head_size`` features and F neurons."""

    family: Family
    index: int
    module: nn.Module
    head_size: int

    def _get(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)

    def _projection(self, path: str) -> Projection:
        layer = self._get(path)
        assert isinstance(layer, nn.Linear | LowRankLinear), f"{path} is a {type(layer).__name__}"
        return layer

    @property
    def heads(self) -> int:
        """H; zero when all heads were removed."""
        if isinstance(self._get(self.family.attention), EmptyAttention):
            return 0
        return self._projection(self.family.query).out_features // self.head_size

    @property
    def neurons(self) -> int:
        """F; zero when all neurons were removed."""
        if isinstance(self._get(self.family.ffn_in), FirstFeature):
            return 0
        return self._projection(self.family.ffn_in).out_features

    @property
    def query(self) -> Projection:
        return self._projection(self.family.query)

    @property
    def key(self) -> Projection:
        return self._projection(self.family.key)

    @property
    def value(self) -> Projection:
        return self._projection(self.family.value)

    @property
    def attention_output(self) -> Projection:
        """Its input (B, T, H * head_size) is where heads are masked; exists only while H > 0."""
        return self._projection(self.family.attention_output)

    @property
    def ffn_in(self) -> Projection:
        return self._projection(self.family.ffn_in)

    @property
    def ffn_out(self) -> Projection:
        """Its input (B, T, F) is where neurons are masked; exists only while F > 0."""
        return self._projection(self.family.ffn_out)

    def keep_heads(self, kept: Sequence[int]) -> None:
        """Cut out every head that is not in ``kept`` (indices among the heads the layer has now)."""
        if len(kept) == self.heads:
            return
        if not kept:
            self._empty_attention()
            return
        columns = [h * self.head_size + i for h in kept for i in range(self.head_size)]
        for projection in (self.query, self.key, self.value):
            keep_outputs(projection, columns)
        keep_inputs(self.attention_output, columns)
        attention: Any = self._get(self.family.attention)
        for name in ("num_attention_heads", "n_heads"):
            if hasattr(attention, name):
                setattr(attention, name, len(kept))
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = len(columns)
        if self.family.shared_head_bias:
            _select_head_bias(attention, kept)

    def keep_neurons(self, kept: Sequence[int]) -> None:
        """Cut out every feed-forward neuron that is not in ``kept`` (indices among those it has now)."""
        if len(kept) == self.neurons:
            return
        if not kept:
            bias = _bias_of(self.ffn_out)
            self._set(self.family.ffn_in, FirstFeature())
            self._set(self.family.ffn_out, bias)
            return
        keep_outputs(self.ffn_in, kept)
        keep_inputs(self.ffn_out, kept)

    def keep_features(self, kept: Sequence[int]) -> None:
        """Cut the features of the residual stream that are not in ``kept``: what the layer reads and writes."""
        readers = [self.query, self.key, self.value] if self.heads else []
        readers += [self.ffn_in] if self.neurons else []
        # Query, key and value may have one right factor together, which is cut once.
        own = {id(r.first) if isinstance(r, LowRankLinear) else id(r): r for r in readers}
        for projection in own.values():
            keep_inputs(projection, kept)
        for path in (self.family.attention_output, self.family.ffn_out):
            writer: Any = self._get(path)
            keep_outputs(writer, kept)
        for norm in (self.attention_norm, self.ffn_norm):
            keep_normalised(norm, kept)

    @property
    def attention_norm(self) -> nn.LayerNorm:
        """What the feed-forward sub-layer reads."""
        return self._norm(self.family.attention_norm)

    @property
    def ffn_norm(self) -> nn.LayerNorm:
        """What the next layer reads."""
        return self._norm(self.family.ffn_norm)

    def _norm(self, path: str) -> nn.LayerNorm:
        norm = self._get(path)
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def _empty_attention(self) -> None:
        bias = _bias_of(self.attention_output)
        attention, output = self.family.attention, self.family.attention_output
        if output.startswith(attention + "."):
            self._set(attention, EmptyAttention(output.removeprefix(attention + "."), bias))
        else:
            self._set(attention, EmptyAttention())
            self._set(output, bias)

    def _set(self, path: str, module: nn.Module) -> None:
        self.module.set_submodule(path, module)


def encoder_layers(model: nn.Module, family: Family, head_size: int | None = None) -> list[Layer]:
    """Return the encoder layers of a classification model, first to last."""
    size = head_size or head_size_of(model)
    modules = model.get_submodule(family.layers)
    assert isinstance(modules, nn.ModuleList)
    return [Layer(family, index, module, size) for index, module in enumerate(modules)]


def keep_layers(model: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Keep only the given encoder layers of ``model``, in place."""
    modules: Any = model.get_submodule(family.layers)
    model.set_submodule(family.layers, nn.ModuleList(modules[i] for i in kept))


def entrance(model: nn.Module, family: Family) -> nn.Module:
    """What writes the residual stream that the first layer reads.

    The layer norm of the embeddings, or, where ELECTRA's embeddings are narrower than its layers, the
    projection between them.
    """
    base: Any = model.get_submodule(family.base)
    project: nn.Module | None = getattr(base, "embeddings_project", None)
    return base.embeddings.LayerNorm if project is None else project


def reader(model: nn.Module, family: Family) -> Projection:
    """The linear layer that reads the encoder's output of the first token."""
    found = model.get_submodule(family.reader)
    assert isinstance(found, nn.Linear | LowRankLinear)
    return found


def width_of(model: nn.Module, family: Family) -> int:
    """D, the features of the residual stream that the model has now; its configuration has those of before."""
    return reader(model, family).in_features


def keep_features(model: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Keep only the given features of the residual stream, in place; heads keep their number and size.

    One index goes through whatever writes the stream (embeddings, output projections), normalises it, or
    reads it (query, key, value, the first feed-forward layer, the first layer of the classification head).
    """
    first: Any = entrance(model, family)
    if isinstance(first, nn.LayerNorm):
        embeddings = model.get_submodule(f"{family.base}.embeddings")
        for table in embeddings.children():
            if isinstance(table, LowRankEmbedding):
                keep_outputs(table.second, kept)
            elif isinstance(table, nn.Embedding):
                keep_columns(table, kept)
            elif isinstance(table, LowRankEmbedding):
                keep_outputs(table.second, kept)
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


def encoder_linears(model: nn.Module, family: Family) -> dict[str, nn.Linear]:
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


def _bias_of(layer: Projection) -> BiasOnly:
    bias = layer.bias
    if bias is None:
        bias = torch.zeros(layer.out_features)
    return BiasOnly(bias)


def _select_head_bias(attention: Any, kept: Sequence[int]) -> None:
    """Make a module of shared head biases see only the part of its own heads."""
    before: list[int] | None = getattr(attention, "kdcli_heads", None)
    attention.kdcli_heads = [before[h] for h in kept] if before is not None else list(kept)
    if before is None:
        attention.register_forward_pre_hook(_bias_hook(), with_kwargs=True)


def _bias_hook() -> Callable[..., tuple[tuple[object, ...], dict[str, object]]]:
    def hook(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        # (hidden_states, attention_mask, position_bias): the third, by place or by name.
        heads: Any = module.kdcli_heads
        if len(args) > 2 and isinstance(args[2], Tensor):
            args = (*args[:2], args[2][:, heads], *args[3:])
        elif isinstance(kwargs.get("position_bias"), Tensor):
            kwargs = {**kwargs, "position_bias": kwargs["position_bias"][:, heads]}  # type: ignore[index]
        return args, kwargs

    return hook
