"""What schemes, and the ways of rounding that they choose among, must offer: the contract of this stage's folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from kdcli.models.integers import Integers
from kdcli.registry import MethodSpec

if TYPE_CHECKING:
    from kdcli.context import Applied, Context
    from kdcli.stages.quantize.plan import QuantizePlan

INTEGER_TABLES = ("int8", "int4", "fp32")

Rounds = Literal["none", "dynamic", "fixed"]
"""How a graph rounds what matrices read: not at all, with ranges found when it runs, or with ranges fixed before."""


class OfWeight(Protocol):
    """Rounds a weight by itself."""

    def __call__(
        self, weight: Tensor, bits: int, group: int | None, config: Any, *, symmetric: bool = False
    ) -> Integers:
        """Round (O, I); see :func:`kdcli.stages.quantize.rounding.hqq.quantise`."""
        ...


class OfInputs(Protocol):
    """Rounds a weight by what its layer reads."""

    def __call__(
        self,
        weight: Tensor,
        hessian: Tensor,
        bits: int,
        group: int | None,
        config: Any,
        *,
        symmetric: bool = False,
    ) -> Integers:
        """Round (O, I) with the Hessian X^T X (I, I); see :func:`kdcli.stages.quantize.rounding.gptq.quantise`."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightRounding(MethodSpec):
    """A way of choosing integers, scales and zero points; one of the two is there."""

    of_weight: OfWeight | None = None
    of_inputs: OfInputs | None = None


class QuantiseMatrix(Protocol):
    """Rounds a weight while a model trains."""

    def __call__(self, weight: Tensor, config: Any, *, table: bool = False) -> Integers:
        """Round a matrix (O, I), or a table (V, D)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained with rounded weights; see :mod:`kdcli.stages.quantize.qat`."""

    quantise: QuantiseMatrix
    epochs: int  # where --epochs says nothing
    everywhere: bool  # every matrix; else those of the encoder and, where asked, the token table
    ranges: bool  # what matrices read is rounded to 8 bits, with ranges that the training finds
    zeros: bool = True  # its integers have a zero
    unsigned: bool = False  # integers of matrices as uint8 in the graph
    reduce_range: bool = False  # they stay within [-64, 64]
    pack: bool = False  # they stay packed in a graph of 8-bit products


def _nothing(context: Context, plan: QuantizePlan) -> None:
    return None


def _no_operators(config: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Scheme(MethodSpec):
    """A number format: what it rounds, how, and how its graph is written.

    Its ``config`` has ``smooth`` where SmoothQuant may come first, and ``rounding`` where the way of rounding is one
    of ``rounding/``.
    """

    #: Rounds the model of the context in place and says how its graph is written.
    apply: Callable[[Context, QuantizePlan], Applied]
    #: Raises a UsageError for what only this scheme knows to be wrong.
    check: Callable[[Context, QuantizePlan], None] = _nothing
    #: How its graph rounds activations, where layers can be exchanged one by one to see what each costs.
    rounds: Rounds | None = None
    #: How it trains, by its config; None: it does not.
    training: Callable[[Any], Training] | None = None
    tables: tuple[str, ...] = INTEGER_TABLES  # what --embeddings may be
    embeddings: str = "int8"  # where it says nothing
    convolutions: bool = False  # rounds them too
    calibrates: bool = False  # has a use for --calibration
    #: Operators of its graph that some onnxruntime does not have, as ``export/runtimes.py`` names them.
    operators: Callable[[Any], tuple[str, ...]] = _no_operators

    @property
    def smooths(self) -> bool:
        """Whether SmoothQuant may come first."""
        return "smooth" in self.settings

    @property
    def names_rounding(self) -> bool:
        """Whether the way of rounding is one of ``rounding/``."""
        return "rounding" in self.settings
