"""``--scheme auto``: build what could do, measure all of it here, and take the best that meets the gates."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kdcli import registry
from kdcli.context import Applied, Context
from kdcli.errors import KdcliError, UsageError
from kdcli.export import graph as graphs
from kdcli.inputs import sampling
from kdcli.inputs.text import Encoded
from kdcli.measure import comparison, environment
from kdcli.measure import measurement as measuring
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.report import gates, metrics
from kdcli.report.schema import Delta, Gate, Measurement
from kdcli.stages.quantize import guard
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize.options import EMBEDDINGS, QuantizeOptions
from kdcli.stages.quantize.scheme import Scheme
from kdcli.timing import Timings

SCHEME = "auto"
"""As ``--scheme`` has it."""


class Config(BaseModel):
    """Parameters of the choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    objective: Literal["fastest", "smallest"] = Field(
        "fastest", description="which of the candidates that meet the gates is taken"
    )
    rows: int = Field(1000, ge=1, description="of validation, for the accuracy of a candidate")


@dataclass(frozen=True)
class Candidate:
    """A scheme with settings."""

    name: str
    scheme: str
    settings: Mapping[str, str] = field(default_factory=dict)
    embeddings: str | None = None


CANDIDATES = (
    Candidate("dynamic-int8", "dynamic-int8"),
    Candidate("static-int8", "static-int8"),
    Candidate("int4", "int4"),
    Candidate("int4, 8-bit products", "int4", {"compute": "int8"}),
    Candidate("mixed: int8 matrices, int4 tables", "dynamic-int8", embeddings="int4"),
    Candidate("fp16", "fp16"),
)

# Two candidates whose times differ by less are equally fast; the smaller one is taken then.
_SAME_TIME = 1.03


@dataclass
class Tried:
    """A candidate, built and measured."""

    candidate: Candidate
    seconds: float = 0.0
    measurement: Measurement | None = None
    delta: Delta | None = None
    gates: list[Gate] = field(default_factory=list)
    error: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.measurement is not None and all(gate.passed for gate in self.gates)

    @property
    def milliseconds(self) -> float:
        assert self.measurement is not None
        return self.measurement.latency[0].p50_ms

    @property
    def bytes(self) -> int:
        assert self.measurement is not None
        return self.measurement.size.onnx_bytes or 0

    @property
    def drop(self) -> float:
        assert self.delta is not None
        assert self.measurement is not None
        return gates.drop_of(self.measurement, self.delta) or 0.0

    @property
    def loss(self) -> str:
        """In words; a gain is none."""
        assert self.measurement is not None
        assert self.measurement.quality is not None
        return metrics.of(self.measurement.quality.primary).points(max(0.0, self.drop))

    def row(self) -> dict[str, Any]:
        """For the report."""
        made: dict[str, Any] = {"candidate": self.candidate.name, "scheme": self.candidate.scheme}
        made |= {"settings": dict(self.candidate.settings), "embeddings": self.candidate.embeddings}
        if self.measurement is not None and self.delta is not None:
            assert self.measurement.quality is not None
            made |= {
                self.measurement.quality.primary: self.measurement.quality.main.value,
                "drop": self.drop,
                "agreement": self.delta.agreement,
                "p50_ms": {str(one.batch): one.p50_ms for one in self.measurement.latency},
                "speedup": self.delta.speedup,
                "onnx_bytes": self.bytes,
            }
        return made | {"seconds": round(self.seconds, 1), "chosen": not self.reason, "reason": self.reason}


@dataclass(frozen=True)
class AutoPlan:
    """A choice among :data:`CANDIDATES`."""

    options: QuantizeOptions
    config: Config


def configured(settings: Mapping[str, str]) -> Config:
    """The parameters of the choice; every candidate has its own settings.

    Raises:
        UsageError: An unknown setting or a bad value.
    """
    own = list(Config.model_fields)
    if strange := next((key for key in settings if key not in own), None):
        raise UsageError(
            f"unknown setting '{strange}': --scheme {SCHEME} has {' and '.join(own)}, "
            "and tries every scheme as it is by default",
            "name one scheme to set more of it",
        )
    found: Config = registry.parse_config(Config, settings)
    return found


def plan_of(context: Context) -> AutoPlan:
    """Check the options of a request.

    Raises:
        UsageError: A bad option, or one that the choice has no use for.
    """
    options = context.request.options_as(QuantizeOptions)
    config = configured(context.request.common.settings)
    embeddings = plans.tables_of(SCHEME, EMBEDDINGS, options, "int8")
    plans.choose(context.checkpoint.model, options.keep_fp32, tables=embeddings != "fp32")
    if options.epochs:
        raise UsageError(
            f"--scheme {SCHEME} trains nothing, so --epochs {options.epochs} has no meaning; leave it at 0"
        )
    if options.sensitivity:
        raise UsageError(
            f"--sensitivity belongs to one scheme, and {SCHEME} tries several",
            "name the scheme with --scheme",
        )
    return AutoPlan(options, config)


def apply(context: Context, plan: AutoPlan) -> Applied:
    """Try every candidate on a copy of the input, then carry the best one out on the input itself."""
    options = plan.options
    candidates = [
        one for one in CANDIDATES if options.embeddings in (None, one.embeddings) or _takes(one, options)
    ]
    timings = Timings()
    count = min(plan.config.rows, context.request.common.limit or plan.config.rows)
    rows = sampling.judged(
        context.encoded["validation"], count, sampling.JUDGING_SEED, context.checkpoint.task
    )
    conditions = measuring.Conditions(
        threads=environment.threads(),
        device="cpu",
        batch_sizes=(1, 32),
        runtimes=("onnx",),
        timings=timings,
        progress=context.progress,
    )
    with tempfile.TemporaryDirectory(prefix="kdcli-auto-") as folder:
        tried = _try_all(context, candidates, rows, Path(folder), conditions)
    best = choose(tried, plan.config.objective)
    for one in tried:
        if one is not best and not one.reason:
            one.reason = why_not(one, best, plan.config.objective)
    context.progress.note(f"chosen: {best.candidate.name}")
    for one in tried:
        if one is not best:
            context.progress.note(f"not {one.candidate.name}: {one.reason}")
    applied = _carry_out(context, best.candidate)
    table = [one.row() for one in tried]
    detail: dict[str, Any] = {
        "chosen": best.candidate.name,
        "objective": plan.config.objective,
        "candidates": table,
    }
    detail |= {"rows": len(rows), "split": "validation"}
    params = {"asked": "auto", "objective": plan.config.objective} | applied.method.params
    applied.method = applied.method.model_copy(
        update={"detail": {"auto": detail} | applied.method.detail, "params": params}
    )
    return applied


def _takes(candidate: Candidate, options: QuantizeOptions) -> bool:
    """Whether a candidate's tables can have the format that the user asked for."""
    scheme = registry.load("quantize", candidate.scheme, Scheme)
    return candidate.embeddings is None and options.embeddings in scheme.tables


def _carry_out(context: Context, candidate: Candidate) -> Applied:
    """One candidate, on the checkpoint of ``context``."""
    options = context.request.options_as(QuantizeOptions)
    options = options.model_copy(
        update={"scheme": candidate.scheme, "embeddings": candidate.embeddings or options.embeddings}
    )
    request = replace(
        context.request,
        options=options,
        common=context.request.common.model_copy(update={"settings": candidate.settings}),
    )
    own = replace(context, request=request)
    plan = plans.of(own)
    plan.scheme.check(own, plan)
    return guard.apply(own, plan)


def _try_all(
    context: Context,
    candidates: list[Candidate],
    rows: Encoded,
    folder: Path,
    conditions: measuring.Conditions,
) -> list[Tried]:
    """Build every candidate, then time all of them in turns with the input."""
    assert context.input_graph is not None
    first = _decided(context.checkpoint, context.input_graph, rows, conditions)
    given = measuring.measure(first, context.input_graph, rows, "validation", conditions, title="input")
    timed = [measuring.Timed(first, context.input_graph, rows, given)]
    tried, found = [], []
    for number, candidate in enumerate(candidates):
        context.progress.phase(f"candidate {candidate.name}")
        one = Tried(candidate)
        tried.append(one)
        (place := folder / str(number)).mkdir()
        clock = Timings()
        try:
            with clock.phase("build"):
                model = _build(context, candidate, place, rows, conditions, clock)
        except KdcliError as error:
            one.error = str(error)
            one.reason = f"it could not be built: {error}"
            continue
        one.seconds = sum(clock.seconds.values())
        model = _decided(model, place / graphs.FILE, rows, conditions)
        measured = measuring.measure(
            model, place / graphs.FILE, rows, "validation", conditions, title=candidate.name
        )
        found.append((one, measured, model.task))
        del model  # its weights; for timing only the graph is needed
        timed.append(measuring.Timed(context.checkpoint, place / graphs.FILE, rows, measured))
    context.progress.phase("time the candidates")
    measuring.time_together(timed, conditions)
    for one, measured, task in found:
        assert rows.labels is not None
        one.measurement = measured.measurement
        one.delta = comparison.row_by_row(
            comparison.compare(given.measurement, measured.measurement),
            task.compare(given.logits, measured.logits, rows.labels, rows.queries, first.task),
        )
        one.gates = gates.judge(
            context.request.common.gates, given.measurement, measured.measurement, one.delta
        )
    return tried


def _decided(model: Checkpoint, graph: Path, rows: Encoded, conditions: measuring.Conditions) -> Checkpoint:
    """The same as it would ship: what validation rows decided for the input they decide anew for its successor.

    Here they are the rows that judge, for the input as for every candidate.
    """
    if not model.task.decided:
        return model
    task = measuring.decided(
        model, rows, conditions.progress, graph=graph, device=conditions.device, threads=conditions.threads
    )
    return replace(model, task=task)


def _build(
    context: Context,
    candidate: Candidate,
    place: Path,
    rows: Encoded,
    conditions: measuring.Conditions,
    timings: Timings,
) -> Checkpoint:
    """Quantise a copy of the input and export it; the weights of the copy are let go afterwards."""
    given = context.checkpoint
    clone = replace(given, model=copy.deepcopy(given.model), log=given.log.model_copy(deep=True))
    applied = _carry_out(replace(context, checkpoint=clone), candidate)
    checkpoints.save(applied.checkpoint, place, integers=applied.integers, half=applied.half)
    del applied.checkpoint, clone
    model = checkpoints.load(place, device=context.device)
    graphs.build(
        model,
        place / graphs.FILE,
        rows,
        threads=conditions.threads,
        timings=timings,
        progress=context.progress,
        rewrite=applied.rewrite_onnx,
        attention=applied.fusion,
        exact=applied.exact,
    )
    gc.collect()
    return model


def choose(tried: list[Tried], objective: str) -> Tried:
    """The fastest or smallest candidate that meets the gates; if none does, the one that loses least.

    Raises:
        UsageError: No candidate could be built.
    """
    built = [one for one in tried if one.measurement is not None]
    if not built:
        raise UsageError("none of the candidates could be built", "name a scheme with --scheme to see why")
    if not (good := [one for one in built if one.passed]):
        return min(built, key=lambda one: (sum(not g.passed for g in one.gates), one.drop, one.bytes))
    if objective == "smallest":
        return min(good, key=lambda one: (one.bytes, one.milliseconds))
    fastest = min(one.milliseconds for one in good)
    return min(
        (one for one in good if one.milliseconds <= _SAME_TIME * fastest),
        key=lambda one: (one.bytes, one.milliseconds),
    )


def why_not(one: Tried, best: Tried, objective: str) -> str:
    """What a candidate lost by."""
    missed = [gate for gate in one.gates if not gate.passed]
    if missed and best.passed:
        shown = ", ".join(
            f"{gate.expression} (it has {'nothing' if gate.value is None else f'{gate.value:.4g}'})"
            for gate in missed
        )
        return f"missed {shown}"
    if not best.passed:
        return f"missed as many gates or more, and loses {one.loss} against {best.loss}"
    if objective == "smallest":
        return f"{one.bytes / best.bytes:.2f} times the size"
    if one.milliseconds <= _SAME_TIME * best.milliseconds:
        return f"as fast, but {one.bytes / best.bytes:.2f} times the size"
    return f"{one.milliseconds / best.milliseconds:.2f} times the latency at batch 1"
