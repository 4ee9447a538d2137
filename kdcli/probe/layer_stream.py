"""An encoder run one layer at a time over cached hidden states, for a dense model and the pruned one beside it.

Shape letters: B rows, T tokens, D hidden features, U input features of a sub-layer's output projection (heads
times their size, or neurons), N real tokens.

Every encoder layer has two sub-layers that add to a residual stream x and normalise:

    LN(x + W h + b)        h: the heads' joined outputs, or the activations of the neurons

What a pruned sub-layer should give is what the dense one gives, although its own residual has already changed:
its target is t = x_dense + W_dense h_dense + b_dense - x_pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.families.layer import Layer
from kdcli.inputs import kinds
from kdcli.inputs.feeding import Labelled
from kdcli.probe.from_layer import starting_at
from kdcli.probe.hooks import Enough, first_of, hooked
from kdcli.probe.layer_calls import calls_of
from kdcli.probe.raw_moments import RawMoments, add

PARTS = ("heads", "neurons")
"""The sub-layers of one layer, in their order."""

FIRST_TOKEN = 0.1


@dataclass(frozen=True)
class Probe:
    """What one sub-layer did with one batch."""

    features: Tensor  # (B, T, U), the input of the output projection; U = 0 where nothing is left
    residual: Tensor  # (B, T, D)
    total: Tensor  # (B, T, D), residual and output together, before the LayerNorm


class Stream:
    """The hidden states of some rows in front of one encoder layer.

    Args:
        model: In eval mode.
        family: Of the model.
        layers: Its encoder layers; they may be pruned while the stream is used.
        batches: Model inputs; the stream holds one state (B, T, D) for each.
    """

    def __init__(
        self, model: nn.Module, family: Encoder, layers: Sequence[Layer], batches: Sequence[Labelled]
    ):
        self.model, self.family, self.layers = model, family, list(layers)
        self.masks = [kinds.mask(inputs).bool() for inputs, _ in batches]
        self._inputs = [inputs for inputs, _ in batches]
        self._calls, self.states = calls_of(model, layers[0].module, self._inputs)

    def __len__(self) -> int:
        return len(self.states)

    @torch.no_grad()
    def call(self, layer: Layer, number: int) -> Tensor:
        """Output (B, T, D) of a layer for the states of one batch."""
        return self._calls[number](layer.module, self.states[number])

    def advance(self, layer: Layer) -> None:
        """Take the states past a layer."""
        self.states = [self.call(layer, number) for number in range(len(self))]

    @torch.no_grad()
    def visit(
        self, layer: Layer, number: int, parts: Sequence[str] = PARTS
    ) -> tuple[dict[str, Probe], Tensor | None]:
        """What the sub-layers of a layer do with one batch, and the layer's output (B, T, D).

        Without ``neurons`` among the parts the layer is left after its attention, and there is no output.
        """
        found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        hooks = [hook for part in parts for hook in self._watch(layer, part, found[part], part == parts[-1])]
        output = None
        with hooked(hooks), suppress(Enough):
            output = self.call(layer, number)
        if "heads" in found:
            found["heads"]["residual"] = self.states[number]
        return {part: _probe(layer, part, own) for part, own in found.items()}, output

    def _watch(self, layer: Layer, part: str, found: dict[str, Tensor], last: bool) -> Iterator[Any]:
        family, module, attention = layer.family, layer.module, part == "heads"
        empty = not (layer.heads if attention else layer.neurons)
        ends = attention and last

        def keep_output(_: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
            found["output"] = first_of(result)
            if not empty:
                found["features"] = args[0]
            if ends:
                raise Enough

        def keep_residual(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found["residual"] = args[0]

        path = family.attention_output if attention else family.ffn_out
        if attention and empty and path.startswith(family.attention + "."):
            path = family.attention  # the bias that is left of the projection is read inside
        yield module.get_submodule(path).register_forward_hook(keep_output)
        if not attention:
            yield module.get_submodule(family.ffn_in).register_forward_pre_hook(keep_residual)

    def logits(self, index: int) -> Iterator[Tensor]:
        """Logits (B, C) of every batch when layer ``index`` and all after it run on the states of now."""
        with starting_at(self.model, self.family, index, self.states):
            for inputs in self._inputs:
                with torch.no_grad():
                    yield self.model(**inputs).logits.float()


class Pair:
    """A model that is being pruned, and the same model as it was, both in front of the same layer.

    Args:
        model: In eval mode; its layers are pruned in place by the caller.
        family: Of the model.
        layers: Its encoder layers.
        batches: Rows to look at.
        first_token: Weight of the tokens after the first in the last layer, see :func:`token_weights`.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Encoder,
        layers: Sequence[Layer],
        batches: Sequence[Labelled],
        *,
        first_token: float = FIRST_TOKEN,
    ) -> None:
        self.layers = list(layers)
        self.dense_layers = [
            Layer(layer.family, layer.index, copy.deepcopy(layer.module), layer.head_size) for layer in layers
        ]
        self.pruned = Stream(model, family, layers, batches)
        self.dense = copy.copy(self.pruned)  # the same first states; its own afterwards
        self.first_token = first_token
        self._totals: dict[str, list[Tensor]] = {}

    def enter(self, index: int) -> None:
        """Run the dense model through a layer and keep what its sub-layers give."""
        layer = self.dense_layers[index]
        self._totals = {part: [] for part in PARTS}
        outputs: list[Tensor] = []
        for number in range(len(self.dense)):
            found, output = self.dense.visit(layer, number)
            assert output is not None
            outputs.append(output)
            for part in PARTS:
                self._totals[part].append(found[part].total)
        self.dense.states = outputs

    def moments(self, index: int, part: str) -> RawMoments:
        """Of the pruned sub-layer's features, with what the dense one would have them give."""
        found: RawMoments | None = None
        for number, mask in enumerate(self.pruned.masks):
            own = self.pruned.visit(self.layers[index], number, (part,))[0][part]
            target = self._totals[part][number] - own.residual
            found = add(found, *rows(own.features, target, self.weights(index, mask)))
        assert found is not None, "a stream has at least one batch"
        return found

    def leave(self, index: int) -> None:
        """Take the pruned model past a layer, once nothing of it changes any more."""
        self.pruned.advance(self.layers[index])

    def weights(self, index: int, mask: Tensor) -> Tensor:
        """See :func:`token_weights`."""
        return token_weights(mask, index == len(self.layers) - 1, self.first_token)


def token_weights(mask: Tensor, last: bool, others: float) -> Tensor:
    """Weight of every token in the moments of a layer: (B, T) bool to (B, T); zero for padding.

    A classifier reads the first token of the last layer alone; the others still tell what its features are like.
    """
    weight = mask.float()
    if last:
        weight = weight * others
        weight[:, 0] = 1.0
    return weight


def rows(features: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of weight above zero, times the root of it: (N, U), (N, D) and the roots (N, 1)."""
    at = weight > 0
    root = weight[at].sqrt()[:, None]
    return features[at].float() * root, target[at].float() * root, root


def _probe(layer: Layer, part: str, found: Mapping[str, Tensor]) -> Probe:
    residual = found["residual"]
    return Probe(found.get("features", residual[..., :0]), residual, residual + found["output"])
