"""How an encoder calls its layers: what each of them gets besides the hidden state, batch by batch.

Two loops run layers by these calls. They differ in what they hold between layers: :mod:`kdcli.probe.layer_stream`
(prune) visits the sub-layers of a layer several times while they are cut, :mod:`kdcli.stages.lowrank.sequential` keeps
what the dense layer read and gave until its replacement is fitted to it. :mod:`kdcli.probe.in_order` (GPTQ) needs no
family: it finds the order of any model's layers by running one batch.

Shape letters: B rows, T tokens, D hidden features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.probe.hooks import Enough, first_of, hooked


@dataclass(frozen=True)
class LayerCall:
    """How one batch calls an encoder layer: the hidden state comes first, the rest is the same for all layers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, state: Tensor) -> Tensor:
        """Output (B, T, D) of a layer for a hidden state (B, T, D)."""
        return first_of(layer(state, *self.args, **self.kwargs))


@torch.no_grad()
def calls_of(
    model: nn.Module, first: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> tuple[list[LayerCall], list[Tensor]]:
    """How the first encoder layer of a model is called, and its hidden state (B, T, D), for every batch.

    Args:
        model: In eval mode.
        first: Its first encoder layer; nothing from there on runs.
        batches: Arguments of the model.
    """
    calls: list[LayerCall] = []
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        states.append(args[0] if args else rest.pop("hidden_states"))
        calls.append(LayerCall(args[1:], rest))
        raise Enough

    with hooked([first.register_forward_pre_hook(keep, with_kwargs=True)]):
        for batch in batches:
            with suppress(Enough):
                model(**batch)
    return calls, states
