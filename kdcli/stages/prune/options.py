"""Options of ``kdcli prune``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from kdcli import registry
from kdcli.errors import UsageError, did_you_mean
from kdcli.options import Flag, choice, one_of
from kdcli.request import Recovery

STRUCTURES: dict[str, str] = {
    "weights": "sparsegpt",
    "n:m": "sparsegpt",  # any N:M, such as 2:4
    "heads": "sensitivity",
    "neurons": "sensitivity",
    "heads+neurons": "sensitivity",
    "layers": "layer-kl",
    "width": "width-energy",
    "vocab": "token-count",
}
"""Structure that ``prune`` can remove -> the method it uses unless ``--method`` says otherwise."""

STRUCTURE_NAMES: tuple[str, ...] = tuple("2:4" if name == "n:m" else name for name in STRUCTURES)
"""What ``--structure`` may be given as; beside 2:4 any other N:M."""

COMBINED: tuple[str, ...] = ("vocab", "layers", "width", "heads", "neurons")
"""Structures that ``+`` joins, in the order in which they are pruned."""

SCHEDULES = ("iterative", "one-shot", "gradual")


def parts_of(structure: str) -> tuple[str, ...]:
    """What a sum of structures consists of, in the order in which it is pruned; heads and neurons are one part.

    >>> parts_of("neurons+layers+heads")
    ('layers', 'heads+neurons')

    Raises:
        UsageError: A part that there is not, or one given twice.
    """
    given = structure.split("+")
    for part in given:
        if part not in COMBINED:
            raise UsageError(f"unknown structure '{part}' in '{structure}': {did_you_mean(part, COMBINED)}")
        if given.count(part) > 1:
            raise UsageError(f"structure '{structure}' names {part} twice")
    units = "+".join(part for part in ("heads", "neurons") if part in given)
    return tuple(part for part in (*COMBINED[:3], units) if part in given or part == units != "")


def n_of_m(structure: str) -> tuple[int, int] | None:
    """The numbers of a structure like ``2:4``; None when it is another kind.

    >>> n_of_m("2:4"), n_of_m("heads")
    ((2, 4), None)
    """
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", structure)
    return None if found is None else (int(found[1]), int(found[2]))


def _structure(given: str) -> str:
    """Check the name of what is pruned: of N:M, whose numbers are free, the form; of a sum, the parts."""
    if "+" in given:
        return "+".join(parts_of(given))
    return given if n_of_m(given) else one_of("structure", lambda: STRUCTURE_NAMES)(given)


def _methods() -> Iterable[str]:
    return registry.names("prune")


class PruneOptions(Recovery):
    """``kdcli prune``."""

    exclusive: ClassVar[tuple[str, ...]] = ("sparsity", "budget", "target_speedup")

    structure: Annotated[str, Flag(metavar="NAME", names=lambda: STRUCTURE_NAMES, check=_structure)] = Field(
        default="heads+neurons",
        description="What to remove; + joins vocab, layers, width, heads and neurons; N:M, such as 2:4, zeros all "
        "but N of M neighbours.",
    )
    method: Annotated[str | None, choice("prune method", _methods)] = Field(
        default=None, description="How importance is judged. [default: by structure]"
    )
    sparsity: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction removed. [default: 0.3; with --max-drop the most that keeps it]",
    )
    budget: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, gt=0, le=1, description="Fraction of MACs kept."
    )
    target_speedup: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None,
        gt=1,
        description="How many times faster at batch 1, by latencies measured on this machine.",
    )
    schedule: Annotated[str | None, choice("schedule", lambda: SCHEDULES)] = Field(
        default=None,  # the method's own
        description="gradual: prune while --epochs train. iterative (default of taylor and fisher) or one-shot: how "
        "often they score the model again.",
    )
