"""One encoder layer, seen through its family: heads and neurons as rows and columns, and how to cut some of them out.

transformers 5 has neither head masks nor head pruning, so the surgery lives here. It rests on one
property that all families share: attention reshapes its projections to ``(B, T, -1, head_size)``,
so fewer rows in query, key and value simply are fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.families.modules import (
    BiasOnly,
    EmptyAttention,
    FirstFeature,
    LowRankLinear,
    Projection,
    keep_inputs,
    keep_normalised,
    keep_outputs,
)


@dataclass(frozen=True)
class Place:
    """Where units are in one linear layer: some of its rows (output features), or of its columns (input features)."""

    module: Projection
    rows: bool
    index: list[int]

    def keep(self) -> None:
        """Cut out what is not in ``index``."""
        (keep_outputs if self.rows else keep_inputs)(self.module, self.index)


@dataclass
class Layer:
    """One encoder layer, seen through its family: H heads of ``head_size`` features and F neurons."""

    family: Encoder
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
        return self.query.out_features // (self.head_size * self._fused(self.family.query))

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

    def head_places(self, heads: Sequence[int]) -> list[Place]:
        """The rows and columns of some heads, in every layer that holds a part of them.

        One layer that is query, key and value at once has three equal blocks of rows, in that order.
        """
        columns = [h * self.head_size + i for h in heads for i in range(self.head_size)]
        places = []
        for path in dict.fromkeys((self.family.query, self.family.key, self.family.value)):
            projection, blocks = self._projection(path), self._fused(path)
            size = projection.out_features // blocks
            places.append(Place(projection, True, [b * size + c for b in range(blocks) for c in columns]))
        return [*places, Place(self.attention_output, False, columns)]

    def neuron_places(self, neurons: Sequence[int]) -> list[Place]:
        """The rows and columns of some neurons; a gate would be one more layer whose rows they are."""
        return [Place(self.ffn_in, True, list(neurons)), Place(self.ffn_out, False, list(neurons))]

    def _fused(self, path: str) -> int:
        """How many of query, key and value this layer is."""
        return (self.family.query, self.family.key, self.family.value).count(path)

    def keep_heads(self, kept: Sequence[int]) -> None:
        """Cut out every head that is not in ``kept`` (indices among the heads the layer has now)."""
        if len(kept) == self.heads:
            return
        if not kept:
            self._empty_attention()
            return
        for place in self.head_places(kept):
            place.keep()
        attention: Any = self._get(self.family.attention)
        for name in ("num_attention_heads", "n_heads"):
            if hasattr(attention, name):
                setattr(attention, name, len(kept))
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = len(kept) * self.head_size
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
        for place in self.neuron_places(kept):
            place.keep()

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
        # (hidden states, mask, position_bias): the third, by place or by name.
        heads: Any = module.kdcli_heads
        if len(args) > 2 and isinstance(args[2], Tensor):
            args = (*args[:2], args[2][:, heads], *args[3:])
        elif isinstance(kwargs.get("position_bias"), Tensor):
            kwargs = {**kwargs, "position_bias": kwargs["position_bias"][:, heads]}  # type: ignore[index]
        return args, kwargs

    return hook
