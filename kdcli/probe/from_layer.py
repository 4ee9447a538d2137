"""An encoder that starts at one of its layers, from hidden states that are known.

Shape letters: B rows, T tokens, D hidden features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.probe.hooks import hooked


@dataclass(frozen=True)
class States:
    """``logits`` (B, C) of every batch, ``inputs`` of every encoder layer: (B, T, D) of every batch."""

    logits: list[Tensor]
    inputs: list[list[Tensor]]


@torch.no_grad()
def states_of(model: nn.Module, family: Encoder, batches: Sequence[Mapping[str, Tensor]]) -> States:
    """Run the batches and keep what :func:`starting_at` needs."""
    layers: Any = model.get_submodule(family.layers)
    found: list[list[Tensor]] = [[] for _ in layers]

    def note(at: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[at].append(args[0] if args else kwargs["hidden_states"])

        return hook

    with hooked(
        layer.register_forward_pre_hook(note(at), with_kwargs=True) for at, layer in enumerate(layers)
    ):
        logits = [model(**batch).logits for batch in batches]
    return States(logits, found)


@contextmanager
def starting_at(model: nn.Module, family: Encoder, index: int, states: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block the model's encoder starts at its layer ``index``.

    Args:
        model: Any whose encoder passes a hidden state from layer to layer.
        family: Of the model.
        index: Of the first layer that runs.
        states: What that layer gets (B, T, D) of the batches that will run, in their order.
    """
    whole: Any = model.get_submodule(family.layers)
    given = _Given(iter(states), as_tuple=family.gives_tuple)
    model.set_submodule(family.layers, nn.ModuleList([given, *whole[index:]]))
    try:
        yield
    finally:
        model.set_submodule(family.layers, whole)


class _Given(nn.Module):
    """Stands for the layers whose result is known."""

    def __init__(self, states: Iterator[Tensor], *, as_tuple: bool) -> None:
        super().__init__()
        self.states = states
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Return the next state."""
        state = next(self.states)
        return (state,) if self.as_tuple else state
