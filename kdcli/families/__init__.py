"""What an architecture is, one file a family: ``families.of("bert")``.

The folder is the registry. A file of it declares one object called ``FAMILY``; what is no family is named below.
Nothing here imports torch before a view of a model is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import lru_cache
from pathlib import Path

from kdcli.docstrings import first_line_of
from kdcli.errors import InputError
from kdcli.families.family import Encoder, Family

PARTS = frozenset({"family", "layer", "modules", "positions", "stack"})
"""Files of this folder that are no family: the contract, and the views that all families share."""


@lru_cache(maxsize=1)
def _files() -> dict[str, tuple[Family, Path]]:
    """``model_type`` -> its family and the file that declares it, sorted."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in PARTS)
    found: dict[str, tuple[Family, Path]] = {}
    for name in names:
        family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
        found[family.name] = (family, Path(__file__).with_name(f"{name}.py"))
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def every() -> dict[str, Family]:
    """``model_type`` of a ``config.json`` -> its family, sorted."""
    return {name: family for name, (family, _) in _files().items()}


def summary(model_type: str) -> str:
    """First line of the docstring of a family that kdcli knows."""
    return first_line_of(_files()[model_type][1])


def possible(model_type: str) -> list[str]:
    """What kdcli can do with a classifier of any ``model_type``, as the command line has it."""
    if is_encoder(model_type):
        return ["distill", "prune", "lowrank", "quantize", "evaluate", "predict"]
    convolutions = re.findall(r"kdcli (lowrank [^;,]+)", presumed(model_type).instead or "")
    return ["distill", "prune --structure vocab", *convolutions, "quantize", "evaluate", "predict"]


def find(model_type: str) -> Family | None:
    """The family of a ``model_type``; None where kdcli knows nothing of the architecture."""
    return every().get(model_type)


def presumed(model_type: str) -> Family:
    """The family of a ``model_type``; of an architecture that kdcli does not know, what most of them have in common."""
    return find(model_type) or Family(name=model_type)


def encoders() -> dict[str, Encoder]:
    """The families that are stacks of layers with heads and neurons."""
    return {name: family for name, family in every().items() if isinstance(family, Encoder)}


def is_encoder(model_type: str) -> bool:
    """Whether :func:`of` gives views of such a model."""
    return isinstance(find(model_type), Encoder)


def of(model_type: str) -> Encoder:
    """The family of a ``model_type``, for surgery.

    Raises:
        InputError: kdcli cannot operate on this architecture.
    """
    family = find(model_type)
    if isinstance(family, Encoder):
        return family
    if family is not None and family.instead is not None:
        raise InputError(
            f"a model of type '{model_type}' has no heads, neurons or encoder matrices that kdcli could take out",
            "make it smaller by kdcli prune --structure vocab, by kdcli quantize, or by another width, such as "
            f"--student static-64{family.instead}",
        )
    raise InputError(
        f"kdcli cannot operate on models of type '{model_type}'; it knows {', '.join(encoders())}",
        "such a model can be the teacher (kdcli distill --teacher MODEL --student tiny), be quantised "
        "(kdcli quantize MODEL), or lose tokens (kdcli prune MODEL --structure vocab)",
    )


def spellings(role: str) -> tuple[str, ...]:
    """Every key of ``config.json`` that a family has for a size, such as ``hidden_size`` and ``dim`` for "hidden".

    Args:
        role: ``hidden``, ``layers``, ``heads`` or ``neurons``.
    """
    return tuple(dict.fromkeys(family.keys.of(role) for family in every().values()))
