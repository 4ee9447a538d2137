"""What a batch is: the contract that every kind of inputs keeps, and which kind a batch, a model or a graph has.

A batch is a mapping from the name of an input to its array, numpy's or torch's; the first dimension is B, the rows.
Outside this folder nothing knows the names: ``kinds.mask(batch)``, ``kinds.size(batch)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from kdcli.errors import InputError
from kdcli.inputs.text import TEXT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcli.data.readers import Rows
    from kdcli.inputs.text import Encoded
    from kdcli.tasks.task import Kind

Array = TypeVar("Array", np.ndarray, "Tensor")


class Inputs(Protocol):
    """One kind of inputs. T tokens are what a row has more or fewer of and what its time goes by."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """What a model may take, in the order of a graph."""
        ...

    @property
    def main(self) -> str:
        """The one of the names that no batch, model or graph is without."""
        ...

    @property
    def optional(self) -> frozenset[str]:
        """Names that a batch may lack; :meth:`filled` knows what stands for them."""
        ...

    @property
    def masking(self) -> str | None:
        """The name that says which tokens are real; graphs may want it in another type."""
        ...

    @property
    def axes(self) -> Mapping[int, str]:
        """The dynamic dimensions of every input of a graph: axis -> name."""
        ...

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        longest: int,
        label_index: Mapping[str, int] | None,
        title: str,
        *,
        kind: Kind,
        outputs: int,
        place: Callable[[int], str] | None = None,
    ) -> Encoded:
        """The rows as :mod:`kdcli.inputs.batching` takes them.

        Args:
            rows: N of them.
            tokenizer: The checkpoint's.
            longest: Tokens that a row may have; what is over is cut.
            label_index: Label name -> index; None leaves the labels out.
            title: What the rows are called in a message.
            kind: Of the task's answers, which says what form labels have.
            outputs: C of the head.
            place: Where a row is, for a message; None: by its number in ``title``.

        Raises:
            InputError: A row cannot be read.
        """
        ...

    def mask(self, batch: Mapping[str, Array]) -> Array:
        """(B, T), 1 where a token is real and 0 where it is padding."""
        ...

    def shape(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """B and T, padding included."""
        ...

    def filled(self, batch: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
        """What of the names a batch has, and what stands for the optional ones that it lacks."""
        ...

    def example(
        self, vocabulary: int, names: Iterable[str], device: torch.device | str, *, tokens: int = 7
    ) -> dict[str, Tensor]:
        """A batch for tracing, no dimension of which is 0 or 1; its values do not matter.

        Args:
            vocabulary: Different values that an id may have.
            names: What the model takes.
            device: Where the tensors go.
            tokens: That a row may have at most.
        """
        ...

    def row(self, config: Any, tokens: int, device: torch.device | str) -> dict[str, Tensor]:
        """One row that a model of this configuration answers, of so many tokens and no padding."""
        ...


KINDS: tuple[Inputs, ...] = (TEXT,)


def of(names: Iterable[str]) -> Inputs:
    """The kind whose main input is among these names: of a batch, or of what a model or a graph takes.

    Raises:
        InputError: There is none.
    """
    given = list(names)
    for kind in KINDS:
        if kind.main in given:
            return kind
    known = ", ".join(f"'{kind.main}' ({kind.name})" for kind in KINDS)
    raise InputError(f"the inputs {', '.join(given) or 'none'} are of no kind that kdcli knows: {known}")


def mask(batch: Mapping[str, Array]) -> Array:
    """(B, T), 1 where a token of a row is real and 0 where it is padding."""
    return of(batch).mask(batch)


def shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """B and T, padding included."""
    return of(batch).shape(batch)


def size(batch: Mapping[str, Any]) -> int:
    """B, the rows of a batch."""
    return shape(batch)[0]


def tokens(batch: Mapping[str, Any]) -> float:
    """Real tokens of all rows together."""
    return float(mask(batch).sum())
