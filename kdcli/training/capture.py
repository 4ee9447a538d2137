"""Read what happens inside a model while it runs: hidden states, queries, keys, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kdcli import families
from kdcli.errors import UsageError
from kdcli.families import stack
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers, width_of
from kdcli.models.checkpoint import Checkpoint
from kdcli.probe.hooks import Enough, first_of
from kdcli.training.terms import Needs, Shape, Signals


def shape_of(checkpoint: Checkpoint) -> Shape:
    """Sizes of a model as the methods want them."""
    config: Any = checkpoint.config
    classes = len(checkpoint.labels)
    if not families.is_encoder(checkpoint.model_type):
        head = _logits_layer(checkpoint)
        pooled = 0 if head is None else head.in_features
        return Shape(0, int(getattr(config, "hidden_size", 0) or 0), 0, classes, pooled)
    layers = encoder_layers(checkpoint.model, checkpoint.family)
    hidden = width_of(checkpoint.model, checkpoint.family)
    return Shape(len(layers), hidden, int(config.num_attention_heads), classes, hidden)


def _logits_layer(checkpoint: Checkpoint) -> nn.Linear | None:
    return stack.logits_layer(checkpoint.model, families.presumed(checkpoint.model_type))


def check_layers(layers: Sequence[Layer], needs: Needs) -> None:
    """Refuse layers that a model does not have, and attention where pruning left no heads.

    Raises:
        UsageError: Says which layer.
    """
    highest = max([*needs.hidden, *needs.attention, 0])
    if highest > len(layers):
        raise UsageError(f"layer {highest} was asked for, but the model has {len(layers)} layers")
    for number in sorted(needs.attention):
        if not layers[number - 1].heads:
            raise UsageError(
                f"layer {number} has no attention heads left, so there is no attention to compare",
                "give pairs without it by --layer-map, or use a method that reads hidden states or answers",
            )


class Capture:
    """Hooks on one model that keep the signals of its latest forward pass.

    ``pooled`` is the last layer's state of the first token, before any dropout; for a model that is no stack of
    encoder layers it is what the layer reads that gives the logits.

    Args:
        checkpoint: The model.
        needs: What to keep.
        cut: End the forward pass after the highest layer that is needed, by raising :class:`Enough`.

    Raises:
        UsageError: The model has no such inside that kdcli knows.
    """

    def __init__(self, checkpoint: Checkpoint, needs: Needs, *, cut: bool = False) -> None:
        self.needs = needs
        self._model = checkpoint.model
        self._hidden: dict[int, Tensor] = {}
        self._projected: dict[str, dict[int, Tensor]] = {"query": {}, "key": {}, "value": {}}
        self._pooled: Tensor | None = None
        self._handles: list[Any] = []
        self._ends_at_input = False
        if not needs:
            return
        if families.is_encoder(checkpoint.model_type):
            self._hook_layers(encoder_layers(checkpoint.model, checkpoint.family), cut)
        elif needs.hidden or needs.attention or (head := _logits_layer(checkpoint)) is None:
            raise UsageError(
                f"a model of type '{checkpoint.model_type}' shows no encoder layers to compare",
                "use a response method, or 'pooled' and the relation methods where the model has a classifier",
            )
        else:
            self._handles.append(head.register_forward_pre_hook(self._keep_pooled))

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def signals(self, logits: Tensor, mask: Tensor) -> Signals:
        """The signals of the forward pass that just ended; the capture forgets them."""
        hidden = {layer: self._hidden[layer] for layer in self.needs.hidden}
        found = Signals(
            logits, mask, self._pooled, hidden, *(dict(self._projected[k]) for k in ("query", "key", "value"))
        )
        self._hidden, self._pooled = {}, None
        self._projected = {"query": {}, "key": {}, "value": {}}
        return found

    def _hook_layers(self, layers: list[Layer], cut: bool) -> None:
        needs, last = self.needs, len(layers)
        check_layers(layers, needs)
        highest = max([*needs.hidden, *needs.attention, last if needs.pooled else 0])
        self._ends_at_input = cut and highest == 0
        for layer in layers:
            number = layer.index + 1
            if number == 1 and 0 in needs.hidden:
                self._handles.append(
                    layer.module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
                )
            if number in needs.attention:
                for name in ("query", "key", "value"):
                    hook = self._keep_projection(name, number, layer.head_size)
                    self._handles.append(getattr(layer, name).register_forward_hook(hook))
            pooled = needs.pooled and number == last
            if number in needs.hidden or pooled or (cut and number == highest):
                ends = cut and number == highest
                hook = self._keep_output(number, number in needs.hidden, pooled, ends)
                self._handles.append(layer.module.register_forward_hook(hook))

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden[0] = args[0] if args else kwargs["hidden_states"]
        if self._ends_at_input:
            raise Enough

    def _keep_pooled(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._pooled = args[0]

    def _keep_projection(self, name: str, number: int, size: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._projected[name][number] = output.unflatten(-1, (-1, size)).transpose(1, 2)

        return hook

    def _keep_output(self, number: int, hidden: bool, pooled: bool, ends: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            state = first_of(output)
            if hidden:
                self._hidden[number] = state
            if pooled:
                self._pooled = state[:, 0]
            if ends:
                raise Enough

        return hook


def run_cut(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run a model under a :class:`Capture` with ``cut``; there is no output, the capture has the signals."""
    # Not inference mode: the losses save these tensors for their gradients.
    with suppress(Enough), torch.no_grad():
        model(**inputs)
