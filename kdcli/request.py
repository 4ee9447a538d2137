"""What a stage is asked for: plain data, no torch, importable in a few milliseconds.

The command line builds one :class:`Request` and hands it to :func:`kdcli.run.life.run`;
a Python caller can do the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdcli import registry
from kdcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.data.recorded import Recorded

StageName = Literal["distill", "prune", "lowrank", "quantize", "evaluate"]

STAGES: tuple[StageName, ...] = ("distill", "prune", "lowrank", "quantize", "evaluate")

DEFAULT_DATA = "rotten-tomatoes"
"""The data alias used when neither ``--data`` nor the model's own report names one."""

SPLIT_SEED = 0
"""A single file is split by a seed of its own, not by ``--seed``: otherwise a later stage with another seed
would test on rows that an earlier one trained on."""

STUDENT_PRESETS: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
}
"""Student name -> (layers, hidden size); ``LxH`` by hand is allowed too."""

STRATEGIES: tuple[str, ...] = ("teacher-assisted", "layerwise", "online", "assistant-chain", "self")
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

SCHEMES: tuple[str, ...] = (*registry.names("quantize"), "auto")
"""What ``quantize --scheme`` may be: the files of ``stages/quantize/schemes``, and the choice among them."""

EMBEDDINGS: tuple[str, ...] = ("int8", "int4", "fp16", "fp32")

INITS: tuple[str, ...] = ("auto", "teacher", "hub", "random")


COMBINED: tuple[str, ...] = ("vocab", "layers", "width", "heads", "neurons")
"""Structures that ``+`` joins, in the order in which they are pruned."""


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


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The conditions a stage's result must meet; every one of them is optional."""

    max_drop: float | None = None  # points of 1 of the primary metric
    min_speedup: float | None = None
    max_size_bytes: int | None = None  # of model.onnx
    expressions: tuple[str, ...] = ()  # "accuracy>=0.9"


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every stage has."""

    out: Path | None = None
    data: str | None = None
    columns: str | None = None
    device: str = "auto"
    seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)  # --set KEY=VALUE, values as given
    limit: int | None = None
    resume: bool = False
    force: bool = False
    offline: bool = False
    debug: bool = False
    gates: Gates = field(default_factory=Gates)


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """``kdcli distill``."""

    teachers: tuple[str, ...]
    student: str
    methods: tuple[str, ...] = ("response",)
    strategy: str = "teacher-assisted"
    alpha: float | None = None
    temperature: float | None = None
    beta: float | None = None  # None: the feature method's own weight
    gamma: float | None = None  # None: the relation method's own weight
    weights: Mapping[str, float] = field(default_factory=dict)
    layer_map: str | None = None
    init: str = "auto"
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    labels: int | None = None
    unlabeled: Path | None = None
    augment: int | None = None  # further texts a row; None: by the number of rows
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """``kdcli prune``."""

    structure: str = "heads+neurons"
    method: str | None = None
    sparsity: float | None = None
    budget: float | None = None
    target_speedup: float | None = None
    schedule: str | None = None  # None: the method's own
    epochs: int = 0
    lr: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """``kdcli lowrank``."""

    method: str = "two-sided"
    budget: float | None = None
    energy: float | None = None
    rank: int | str | None = None  # a number, or "evbmf"
    target_speedup: float | None = None
    merge: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    epochs: int = 0
    lr: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """``kdcli quantize``."""

    scheme: str = "dynamic-int8"
    calibration: str | None = None
    calibration_samples: int = 128
    keep_fp32: tuple[str, ...] = ()
    embeddings: str | None = None  # None: the scheme's own
    sensitivity: bool = False  # measure every layer by itself
    epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """``kdcli evaluate``."""

    models: tuple[str, ...] = ()
    baseline: str | None = None
    split: str | None = None
    runtime: str = "onnx"
    batch_sizes: tuple[int, ...] = (1, 32)
    html: Path | None = None
    summary: Path | None = None
    junit: Path | None = None


Options = DistillOptions | PruneOptions | LowRankOptions | QuantizeOptions | EvaluateOptions


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of one stage."""

    stage: StageName
    model: str | None  # None for distill, whose models are in its options
    options: Options
    common: Common = field(default_factory=Common)
    argv: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # option -> flag|environment|file|default
    dequantize: bool = False
    recorded: Recorded | None = None  # the data, where the model's own report names them


SUCCESSORS: dict[StageName, frozenset[StageName]] = {
    "distill": frozenset(STAGES),
    "prune": frozenset(STAGES),
    "lowrank": frozenset(STAGES),
    # int8 weights have no gradients to follow: only --dequantize makes them dense again.
    "quantize": frozenset({"evaluate"}),
    "evaluate": frozenset(STAGES),
}
"""Which stage may follow which in one lineage."""
