"""Reading a model while it runs, by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key", bound=Hashable)
Watch = AbstractContextManager[None]


class Enough(Exception):
    """Raised by a hook to end a forward pass: nobody needs the rest of it."""


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks at the end of the block, however it ends."""
    placed = list(handles)
    try:
        yield
    finally:
        for handle in placed:
            handle.remove()


def watching(layers: Mapping[Key, nn.Module], see: Callable[[Key, Tensor, Any], None]) -> Watch:
    """Inside the block, call ``see(key, input, output)`` whenever one of the layers has run."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: see(key, inputs[0], output)

    return hooked(layer.register_forward_hook(hook(key)) for key, layer in layers.items())


def reading(layers: Mapping[Key, nn.Module], see: Callable[[Key, Tensor], None]) -> Watch:
    """Inside the block, call ``see(key, input)`` whenever one of the layers is about to run."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: see(key, inputs[0])

    return hooked(layer.register_forward_pre_hook(hook(key)) for key, layer in layers.items())


def first_of(output: Any) -> Any:
    """The hidden state (B, T, D) that an encoder layer gives, alone or in front of a tuple."""
    return output[0] if isinstance(output, tuple) else output
