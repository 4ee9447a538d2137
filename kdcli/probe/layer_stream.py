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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.families.layer import Layer
from kdcli.inputs import kinds
from kdcli.inputs.feeding import Labelled
from kdcli.probe import definite
from kdcli.probe.from_layer import starting_at

PARTS = ("heads", "neurons")
"""The sub-layers of one layer, in their order."""

FIRST_TOKEN = 0.1


class _Stop(Exception):
    """Ends a forward pass early."""


@dataclass(frozen=True)
class Probe:
    """What one sub-layer did with one batch."""

    features: Tensor  # (B, T, U), the input of the output projection; U = 0 where nothing is left
    residual: Tensor  # (B, T, D)
    total: Tensor  # (B, T, D), residual and output together, before the LayerNorm


@dataclass
class Moments:
    """Second moments of a sub-layer's features h and targets t over real tokens, in float64 on the CPU.

    The sums are of h h^T (U, U), h t^T (U, D), t^T t, h (U,), t (D,) and 1.
    """

    hh: Tensor
    ht: Tensor
    tt: float
    h: Tensor
    t: Tensor
    count: float

    def centred(self) -> tuple[Tensor, Tensor, float]:
        """Covariance of h (U, U), of h with t (U, D), and the summed variance of t."""
        h, t = self.h / self.count, self.t / self.count
        spread = self.tt / self.count - float(t @ t)
        return self.hh / self.count - torch.outer(h, h), self.ht / self.count - torch.outer(h, t), spread

    def scale(self) -> float:
        """The mean variance of the features, see :func:`kdcli.probe.definite.scale_of`."""
        return definite.scale_of(self.centred()[0], self.h / self.count)

    def through(self, first: Tensor) -> Moments:
        """The moments of the features ``first`` h, (R, U)."""
        return Moments(
            first @ self.hh @ first.T, first @ self.ht, self.tt, first @ self.h, self.t, self.count
        )


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
        self.states: list[Tensor] = []
        self.masks = [kinds.mask(inputs).bool() for inputs, _ in batches]
        self._inputs = [inputs for inputs, _ in batches]
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = layers[0].module.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            for inputs in self._inputs:
                _run(model, inputs)
        finally:
            hook.remove()

    def __len__(self) -> int:
        return len(self.states)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            self.states.append(args[0])
            self._calls.append((args[1:], dict(kwargs)))
        else:
            rest = dict(kwargs)
            self.states.append(rest.pop("hidden_states"))
            self._calls.append(((), rest))
        raise _Stop

    @torch.no_grad()
    def call(self, layer: Layer, number: int) -> Tensor:
        """Output (B, T, D) of a layer for the states of one batch."""
        args, kwargs = self._calls[number]
        output = layer.module(self.states[number], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

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
        try:
            output = self.call(layer, number)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if "heads" in found:
            found["heads"]["residual"] = self.states[number]
        return {part: _probe(layer, part, own) for part, own in found.items()}, output

    def _watch(self, layer: Layer, part: str, found: dict[str, Tensor], last: bool) -> Iterator[Any]:
        family, module, attention = layer.family, layer.module, part == "heads"
        empty = not (layer.heads if attention else layer.neurons)
        ends = attention and last

        def keep_output(_: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
            found["output"] = result[0] if isinstance(result, tuple) else result
            if not empty:
                found["features"] = args[0]
            if ends:
                raise _Stop

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

    def moments(self, index: int, part: str) -> Moments:
        """Of the pruned sub-layer's features, with what the dense one would have them give."""
        found: Moments | None = None
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


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    try:
        with torch.no_grad():
            model(**inputs)
    except _Stop:
        return


def add(sums: Moments | None, h: Tensor, t: Tensor, root: Tensor) -> Moments:
    """Add the weighted tokens h (N, U) and t (N, D); products in float32, sums in float64.

    Products are taken of what is left without the batch's mean: next to a large mean float32 would lose what varies.
    """

    def lift(x: Tensor) -> Tensor:
        return x.cpu().double()

    count = float(lift(root).square().sum())
    least = count or 1.0
    centre_h, centre_t = (
        h.T @ root / least,
        t.T @ root / least,
    )  # (U, 1) and (D, 1), rounded: any centre will do
    own_h, own_t = h - root @ centre_h.T, t - root @ centre_t.T
    c, d = lift(centre_h)[:, 0], lift(centre_t)[:, 0]
    over_h, over_t = lift(own_h.T @ root)[:, 0], lift(own_t.T @ root)[:, 0]
    parts = (
        lift(own_h.T @ own_h) + torch.outer(c, over_h) + torch.outer(over_h + count * c, c),
        lift(own_h.T @ own_t) + torch.outer(c, over_t) + torch.outer(over_h + count * c, d),
        float(lift(own_t).square().sum() + 2 * (d @ over_t) + count * (d @ d)),
    )
    firsts = (over_h + count * c, over_t + count * d, count)
    if sums is None:
        return Moments(*parts, *firsts)
    return Moments(
        sums.hh + parts[0],
        sums.ht + parts[1],
        sums.tt + parts[2],
        sums.h + firsts[0],
        sums.t + firsts[1],
        sums.count + firsts[2],
    )
