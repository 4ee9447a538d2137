"""What a stage is: what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kdcli.foresight import Foreseen, Sizes
from kdcli.progress import Progress
from kdcli.report.schema import Method, Warning_
from kdcli.request import Request

if TYPE_CHECKING:
    import numpy as np
    import torch

    from kdcli.data.sources import Dataset
    from kdcli.export.fusion import Fusion
    from kdcli.inputs.text import Encoded
    from kdcli.models.checkpoint import Checkpoint
    from kdcli.models.integers import Integers


@dataclass
class Context:
    """One run of one stage: the input, loaded, and the means to work on it."""

    request: Request
    checkpoint: Checkpoint  # the input model; a stage may change it in place
    dataset: Dataset
    encoded: Mapping[str, Encoded]  # split -> tokenised rows with label indices, for this checkpoint
    device: torch.device
    seed: int
    progress: Progress
    resume_dir: Path  # where a resume point of a training goes
    #: The ONNX form of the input, once it has been measured.
    input_graph: Path | None = None
    #: Positions of the validation rows whose labels may decide anything; None where all may.
    deciding: np.ndarray | None = None


@dataclass
class Applied:
    """What a stage did."""

    checkpoint: Checkpoint
    method: Method
    #: Integer weights to store: name -> integers.
    integers: Mapping[str, Integers] | None = None
    #: Names of weights to store as float16.
    half: frozenset[str] = frozenset()
    #: Rewrites the float model.onnx of the new checkpoint (bytes in, bytes out), e.g. into int8.
    rewrite_onnx: Callable[[Path, Path], dict[str, Any]] | None = None
    #: What the float graph that is rewritten has fused.
    fusion: Fusion = "packed"
    #: The rewritten graph rounds no activation, so its logits must be those of the checkpoint.
    exact: bool = False
    warnings: list[Warning_] = field(default_factory=list)


Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Stage(Generic[Plan]):
    """One stage that makes a model, as ``stages/<name>/stage.py`` declares it in ``STAGE``.

    ``prepare`` and ``apply`` are called once: the first before the input is measured, the second after it with what
    that gave.
    """

    #: Refuses bad options and models, does what has to happen before the input is measured, and makes the plan.
    prepare: Callable[[Context], Plan]
    #: Works on the model of the context in place.
    apply: Callable[[Context, Plan], Applied]
    #: What it needs, for --dry-run; refuses bad options. Nothing is loaded.
    foreseen: Callable[[Request, Sizes], Foreseen]
    #: What it let the rows of the validation split choose, in words: of the request and the method's detail in the
    #: report, where a search leaves its tries.
    chosen: Callable[[Request, Mapping[str, Any]], list[str]]
