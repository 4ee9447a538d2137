"""Options of ``kdcli lowrank``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcli import registry
from kdcli.options import Flag, choice
from kdcli.request import Recovery


def _methods() -> Iterable[str]:
    return registry.names("lowrank")


def _rank(given: Any) -> int | str:
    """A whole number from 1 on, or ``evbmf``."""
    if given == "evbmf":
        return "evbmf"
    try:
        rank = int(given)
    except (TypeError, ValueError):
        rank = None
    if rank is None or (isinstance(given, float) and rank != given):
        raise ValueError(f"'{given}' is neither a whole number nor evbmf")
    if rank < 1:
        raise ValueError(f"'{given}' must be at least 1")
    return rank


class LowRankOptions(Recovery):
    """``kdcli lowrank``."""

    exclusive: ClassVar[tuple[str, ...]] = ("budget", "energy", "rank", "target_speedup")

    method: Annotated[str, choice("lowrank method", _methods)] = Field(
        default="two-sided", description="How a matrix is factorised."
    )
    budget: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, gt=0, lt=1, description="Fraction of parameters kept in the factorised layers."
    )
    energy: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, gt=0, le=1, description="Fraction of energy kept per layer."
    )
    rank: Annotated[int | str | None, Flag(metavar="N|evbmf", parse=_rank)] = Field(
        default=None, description="The same rank everywhere, or evbmf."
    )
    target_speedup: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None,
        gt=1,
        description="How many times faster at batch 1, by latencies measured on this machine.",
    )
    merge: bool = Field(default=False, description="Multiply factors back where that is smaller or faster.")
    include: Annotated[tuple[str, ...], Flag(metavar="PATTERN")] = Field(
        default=(), description="Only layers that match this glob; repeatable."
    )
    exclude: Annotated[tuple[str, ...], Flag(metavar="PATTERN")] = Field(
        default=(), description="No layers that match this glob; repeatable."
    )
