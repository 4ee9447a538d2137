"""What a stage is asked for: plain data, no torch.

The command line, a recipe and ``kdcli.distill(...)`` build one :class:`Request` (``kdcli.stages.options.request``) and
hand it to :func:`kdcli.run.life.run`. The options of a stage are in ``kdcli/stages/<stage>/options.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from kdcli.errors import did_you_mean
from kdcli.models.aliases import MODELS
from kdcli.options import Flag, Options, choice, pairs
from kdcli.report.gates import parse_expression, parse_size
from kdcli.report.redact import redact

if TYPE_CHECKING:
    from kdcli.data.recorded import Recorded

StageName = Literal["distill", "prune", "lowrank", "quantize", "evaluate"]

STAGES: tuple[StageName, ...] = ("distill", "prune", "lowrank", "quantize", "evaluate")

DEFAULT_DATA = "rotten-tomatoes"
"""The data alias used when neither ``--data`` nor the model's own report names one."""

SPLIT_SEED = 0
"""A single file is split by a seed of its own, not by ``--seed``: otherwise a later stage with another seed
would test on rows that an earlier one trained on."""

DEVICES = ("auto", "cpu", "cuda", "mps")


def reference(given: str) -> str:
    """Refuse a model reference that is no name at all; whether there is such a model is for preflight to say."""
    if not given.strip():
        raise ValueError("the name of a model is empty")
    return given


def model_aliases() -> Iterable[str]:
    """Names of models that need no path."""
    return MODELS


def task_names() -> Iterable[str]:
    """What ``--task`` takes."""
    from kdcli import tasks

    return tasks.names()


def _data_aliases() -> Iterable[str]:
    from kdcli.data.sources import ALIASES

    return ALIASES


def _device(given: str) -> str:
    """Check ``auto|cpu|cuda[:N]|mps``; whether the device is there is for the stage to say."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", given):
        raise ValueError(f"unknown device '{given}': {did_you_mean(given, DEVICES)}, or cuda:N")
    return given


def _gate(given: str) -> str:
    parse_expression(given)
    return given


def _size(given: Any) -> int:
    return parse_size(str(given))


def _texts(given: Any) -> Any:
    """``--set`` values are texts until the method's own Config reads them."""
    found = pairs(given)
    return {key: value if isinstance(value, str) else str(value) for key, value in found.items()}


class Gates(Options):
    """The conditions a stage's result must meet; every one of them is optional."""

    max_drop: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None,
        ge=0,
        description="Gate: the primary metric may get worse by at most this; 0.01 is one point.",
    )
    min_speedup: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, ge=0, description="Gate: be at least this many times faster."
    )
    max_size_bytes: Annotated[int | None, Flag(name="max-size", metavar="SIZE", parse=_size)] = Field(
        default=None, description="Gate: largest model.onnx, such as 20MiB."
    )
    expressions: Annotated[tuple[str, ...], Flag(name="gate", metavar="EXPR", check=_gate)] = Field(
        default=(), description='Gate such as "accuracy>=0.9"; repeatable.'
    )


class Common(Options):
    """Options that every stage has."""

    out: Annotated[Path | None, Flag(short="o", metavar="DIR", recipe=False)] = Field(
        default=None, description="Output directory. [default: kdcli-out/MODEL-STAGE]"
    )
    data: Annotated[str | None, Flag(metavar="REF", names=_data_aliases)] = Field(
        default=None,
        description="An alias, a directory, a file or a hub data set. [default: the model's own]",
    )
    columns: Annotated[str | None, Flag(metavar="MAP")] = Field(
        default=None,
        description="Column names, such as text=body,label=topic; label=topic:ids for numbers of the model's labels.",
    )
    task: Annotated[str | None, choice("task", task_names)] = Field(
        default=None, description="What an answer is. [default: from the model, else the data]"
    )
    metric: Annotated[str | None, Flag(metavar="NAME")] = Field(
        default=None,
        description="The metric that gates, searches and tables use. [default: the task's own]",
    )
    device: Annotated[str, Flag(metavar="NAME", names=lambda: DEVICES, check=_device)] = Field(
        default="auto", description="auto, cpu, cuda[:N] or mps."
    )
    seed: Annotated[int, Flag(metavar="N")] = Field(default=0, ge=0, le=2**32 - 1, description="Random seed.")
    settings: Annotated[Mapping[str, str], Flag(name="set", metavar="KEY=VALUE", parse=_texts)] = Field(
        default_factory=dict, description="A parameter of the method; repeatable."
    )
    limit: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Measure on at most N rows, every label in its share."
    )
    resume: Annotated[bool, Flag(off=True, recipe=False)] = Field(
        default=False, description="Continue where an interrupted run stopped."
    )
    force: Annotated[bool, Flag(short="f", off=True, recipe=False)] = Field(
        default=False, description="Replace an output that kdcli wrote."
    )
    offline: Annotated[bool, Flag(off=True)] = Field(default=False, description="Never use the network.")
    gates: Gates = Field(default_factory=Gates)


class OneModel(Options):
    """The model of a stage that works on one."""

    model: Annotated[
        str, Flag(argument=True, recipe=False, metavar="MODEL", names=model_aliases, check=reference)
    ] = Field(description="A directory, an alias, org/name[@revision], or - for a line of stdin.")


class StageOptions(Options):
    """What one stage has for itself; the base of its options."""

    #: Whether it works on one MODEL, which the request names.
    takes_model: ClassVar[bool] = True
    #: Common options that mean nothing to it.
    without: ClassVar[frozenset[str]] = frozenset()


class Dense(StageOptions):
    """A stage that needs dense weights."""

    dequantize: Annotated[bool, Flag(off=True)] = Field(
        default=False, description="Accept a quantised model: work on its rounded weights."
    )


class Recovery(Dense):
    """A stage that may train what it has made, from the model that came in."""

    needs: ClassVar[Mapping[str, str]] = {"lr": "epochs", "batch_size": "epochs"}

    epochs: Annotated[int, Flag(metavar="N")] = Field(
        default=0, ge=0, description="Passes of recovery training, 0 for none."
    )
    lr: Annotated[float | None, Flag(metavar="F")] = Field(default=None, gt=0, description="Learning rate.")
    batch_size: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Rows per training step."
    )


OptionsT = TypeVar("OptionsT", bound=StageOptions)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of one stage."""

    stage: StageName
    model: str | None  # None for distill, whose models are in its options
    options: StageOptions
    common: Common = field(default_factory=Common)
    argv: tuple[str, ...] = ()
    #: Option -> flag|environment|file|recipe|argument|model|default.
    origins: Mapping[str, str] = field(default_factory=dict)
    recorded: Recorded | None = None  # the data, where the model's own report names them

    def options_as(self, kind: type[OptionsT]) -> OptionsT:
        """The stage's options as what they are."""
        assert isinstance(self.options, kind), f"the options of {self.stage} are no {kind.__name__}"
        return self.options

    @property
    def dequantize(self) -> bool:
        """Whether a quantised model is accepted, and its rounded weights worked on."""
        return isinstance(self.options, Dense) and self.options.dequantize

    def configuration(self) -> dict[str, Any]:
        """Every resolved option with where its value came from, as reports have it."""
        common = self.common.model_dump()
        values = common | self.options.model_dump() | common.pop("gates")
        return {
            key: {"value": _plain(value), "origin": self.origins.get(key, "default")}
            for key, value in sorted(values.items())
            if key != "gates" and key not in self.options.without
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return redact(str(value))
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


SUCCESSORS: dict[StageName, frozenset[StageName]] = {
    "distill": frozenset(STAGES),
    "prune": frozenset(STAGES),
    "lowrank": frozenset(STAGES),
    # int8 weights have no gradients to follow: only --dequantize makes them dense again.
    "quantize": frozenset({"evaluate"}),
    "evaluate": frozenset(STAGES),
}
"""Which stage may follow which in one lineage."""
