"""Options of ``kdcli evaluate``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcli.options import Flag, choice
from kdcli.request import StageOptions, model_aliases, reference

RUNTIMES: tuple[str, ...] = ("onnx", "torch", "both")


def _batch_sizes(given: Any) -> tuple[int, ...]:
    """``1,32``, a number or a list of numbers."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Iterable) else (given,)
    found = []
    for part in parts:
        try:
            size = int(part) if isinstance(part, str | int) and not isinstance(part, bool) else None
        except ValueError:
            size = None
        if size is None:
            raise ValueError(f"'{part}' is not a whole number")
        if size < 1:
            raise ValueError(f"'{part}' must be at least 1")
        found.append(size)
    return tuple(found)


class EvaluateOptions(StageOptions):
    """``kdcli evaluate``."""

    takes_model: ClassVar[bool] = False
    #: It has no method to set anything of, and trains nothing that could go on.
    without: ClassVar[frozenset[str]] = frozenset({"settings", "resume"})

    models: Annotated[
        tuple[str, ...],
        Flag(argument=True, recipe=False, metavar="MODEL", names=model_aliases, check=reference),
    ] = Field(
        default=(),
        description="Directories, .onnx files, aliases, org/name[@revision], or - for lines of stdin.",
    )
    baseline: Annotated[str | None, Flag(metavar="MODEL", names=model_aliases, check=reference)] = Field(
        default=None, description="Compare with this model."
    )
    split: Annotated[str | None, Flag(metavar="NAME")] = Field(
        default=None, description="Rows to judge on. [default: test, else validation]"
    )
    runtime: Annotated[str, choice("runtime", lambda: RUNTIMES)] = Field(
        default="onnx", description="What runs the models: onnx, torch or both."
    )
    batch_sizes: Annotated[tuple[int, ...], Flag(name="batch-size", metavar="N,N", parse=_batch_sizes)] = (
        Field(default=(1, 32), min_length=1, description="Batch sizes to time.")
    )
    html: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Write one self-contained page."
    )
    summary: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Append Markdown, as for $GITHUB_STEP_SUMMARY."
    )
    junit: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Write the gates as JUnit XML."
    )
