"""``kdcli run RECIPE.yaml``: the same pipeline as in the shell, as a file, with finished stages kept.

    data: DIR            # options that all stages share, named as their flags
    stages:
      - distill: {teacher: minilm, student: tiny}
      - prune: {sparsity: 0.3, max-drop: 0.05}
      - quantize
      - evaluate: {max-drop: 0.02}

A stage's output is kept in the cache under a hash of its input, options, data and versions; an unchanged
stage is taken from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kdcli import cache
from kdcli.data import recorded
from kdcli.errors import ExitCode, InputError, did_you_mean, first_line
from kdcli.measure import environment
from kdcli.models import references
from kdcli.progress import Progress
from kdcli.report import gates, io
from kdcli.report.schema import Report
from kdcli.request import (
    STAGES,
    Common,
    DistillOptions,
    EvaluateOptions,
    Gates,
    LowRankOptions,
    PruneOptions,
    QuantizeOptions,
    Request,
    StageName,
)
from kdcli.run import dry_run as plan
from kdcli.run import output, preflight

_LARGEST = 1 << 20
_OPTIONS: dict[str, Any] = {
    "distill": DistillOptions,
    "prune": PruneOptions,
    "lowrank": LowRankOptions,
    "quantize": QuantizeOptions,
    "evaluate": EvaluateOptions,
}
# Flags that may be given several times fill a field with a plural name.
_PLURAL = {"teacher": "teachers", "method": "methods", "weight": "weights", "batch_size": "batch_sizes"}
_SHARED = ("data", "columns", "device", "seed", "limit", "offline")
_GATES = {
    "max_drop": "max_drop",
    "min_speedup": "min_speedup",
    "max_size": "max_size_bytes",
    "gate": "expressions",
}


_JUDGING = (*_GATES, "max_size", "gate", "baseline", "data", "columns", "split", "limit")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe; its model is the output of the step before."""

    stage: StageName
    options: Any
    common: Common
    dequantize: bool = False
    model: str | None = None


@dataclass
class RecipeOutcome:
    """What ``kdcli run`` hands back."""

    path: Path
    report: Report
    reports: list[Report]


def read(path: Path) -> list[Step]:
    """Read and check a recipe; every mistake in it is found before the first stage runs.

    Raises:
        InputError: The file is missing, broken, or has an unknown key or a wrong value.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"recipe '{path}' is larger than {_LARGEST >> 20} MiB")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe '{path}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"recipe '{path}' is not YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or not content["stages"]:
        raise InputError(f"recipe '{path}' has no list 'stages'", "see kdcli run --help for an example")
    shared = {_key(k): v for k, v in content.items() if k != "stages"}
    for key in shared:
        if key not in (*_SHARED, "model"):
            raise InputError(
                f"recipe '{path}': unknown key '{key}': {did_you_mean(key, (*_SHARED, 'model', 'stages'))}"
            )
    model = shared.pop("model", None)
    steps = []
    for number, entry in enumerate(content["stages"], 1):
        where = f"recipe '{path}', stage {number}"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError(f"{where}: write it as STAGE: {{option: value}}")
        ((name, given),) = entry.items()
        if name not in STAGES:
            raise InputError(f"{where}: unknown stage '{name}': {did_you_mean(str(name), STAGES)}")
        if not isinstance(given or {}, dict):
            raise InputError(f"{where}: the options of {name} are not a mapping")
        steps.append(_step(where, name, {**shared, **{_key(k): v for k, v in (given or {}).items()}}))
    if steps[0].stage != "distill":
        if not isinstance(model, str):
            raise InputError(f"recipe '{path}' starts with {steps[0].stage} but names no 'model'")
        steps[0] = replace(steps[0], model=model)
    elif model is not None:
        raise InputError(f"recipe '{path}' names a 'model', but starts with distill, which has a teacher")
    if any(step.stage == "distill" for step in steps[1:]):
        raise InputError(f"recipe '{path}': distill can only be the first stage")
    return steps


def run(
    path: Path, out: Path | None, force: bool, progress: Progress, dry_run: bool
) -> RecipeOutcome | plan.DryRun:
    """Run a recipe; a stage that misses a gate ends it.

    Args:
        path: The recipe.
        out: Directory for the outputs ``1-distill``, ``2-prune`` ...; by default ``kdcli-out/<recipe>``.
        force: Replace the outputs of an earlier run.
        progress: Observer.
        dry_run: Return the plan of the first stage, whose input exists already, and touch nothing.
    """
    steps = read(path)
    if dry_run:
        made = plan.plan(_request(steps[0], steps[0].model, steps[0].common), progress)
        made.notes.append(
            "then: " + ", ".join(step.stage for step in steps[1:]) if steps[1:] else "no further stage"
        )
        return made
    from kdcli.run import life

    place = out or output.DEFAULT_PARENT / path.stem
    reports: list[Report] = []
    model = steps[0].model
    final = place
    for number, step in enumerate(steps, 1):
        target = place / f"{number}-{step.stage}"
        writes = step.stage != "evaluate"
        name, place_of_data = _cache_key(step, model)
        kept = cache.entry("stages", name)
        progress.phase(f"stage {number} of {len(steps)}: {step.stage}")
        if writes:
            output.choose(target, "", step.stage, force=force, inputs=())
        if writes and cache.whole(kept):
            progress.note(f"{step.stage}: nothing changed, taken from the cache")
            _copy(kept, target, place_of_data, step.stage, force=force)
            report = io.read(target)
        else:
            common = replace(step.common, out=target if writes else None, force=force)
            outcome = life.run(_request(step, model, common), progress)
            assert outcome is not None  # there is one process
            report = outcome.report
            if writes and report.exit_code == ExitCode.OK:
                with cache.writing(kept) as temporary:
                    shutil.copytree(target, temporary, dirs_exist_ok=True)
        reports.append(report)
        if writes:
            model, final = str(target), target
        if report.exit_code != ExitCode.OK:
            break
    return RecipeOutcome(final, reports[-1], reports)


def _request(step: Step, model: str | None, common: Common) -> Request:
    argv = ("kdcli", step.stage)
    return Request(
        stage=step.stage,
        model=None if step.stage == "distill" else model,
        options=step.options,
        common=common,
        argv=argv,
        dequantize=step.dequantize,
    )


def _step(where: str, stage: StageName, given: dict[str, Any]) -> Step:
    kind = _OPTIONS[stage]
    own = {f.name for f in fields(kind)}
    flags = {k for k in own if k not in _PLURAL.values()} | {k for k, v in _PLURAL.items() if v in own}
    allowed = flags | set(_SHARED) | set(_GATES) | {"set", "dequantize"}
    options: dict[str, Any] = {}
    common: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    dequantize = bool(given.pop("dequantize", False))
    for key, value in given.items():
        if key not in allowed or key == "models":
            raise InputError(
                f"{where}: unknown option '{key}' of {stage}: {did_you_mean(key, allowed - {'models'})}"
            )
        if key in _JUDGING and (value is None or value == "" or isinstance(value, bool)):
            # Taken for no value it would silently drop a gate, or judge something else.
            said = (
                "has no value" if value in (None, "") else f"is {str(value).lower()}, which is no value of it"
            )
            raise InputError(f"{where}: '{key.replace('_', '-')}' {said}", "give one, or leave the line out")
        if key == "set":
            common["settings"] = {str(k): str(v) for k, v in _mapping(where, value).items()}
        elif key == "max_size":
            limits["max_size_bytes"] = gates.parse_size(str(value))
        elif key == "gate":
            limits["expressions"] = tuple(value) if isinstance(value, list) else (value,)
        elif key in _GATES:
            limits[_GATES[key]] = value
        elif key in _SHARED:
            common[key] = value
        else:
            name = _PLURAL[key] if key in _PLURAL and _PLURAL[key] in own else key
            plural = name != key and not isinstance(value, list | dict)
            options[name] = [value] if plural else value
    missing = [
        f.name
        for f in fields(kind)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in options
    ]
    if missing:
        back = {v: k for k, v in _PLURAL.items()}
        raise InputError(f"{where}: {stage} needs '{back.get(missing[0], missing[0])}'")
    made = _checked(where, Common, {**common, "gates": _checked(where, Gates, limits)})
    for expression in made.gates.expressions:
        gates.parse_expression(expression)
    return Step(stage, _checked(where, kind, options), made, dequantize)


def _checked(where: str, kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: {key}: {first['msg'].lower()} (given: {first.get('input')!r:.60})"
        ) from error


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: 'set' is not a mapping of KEY: VALUE")
    return value


def _key(name: Any) -> str:
    return str(name).replace("-", "_")


def _cache_key(step: Step, model: str | None) -> tuple[str, str]:
    """Everything that decides a stage's output and the numbers in its report, and where its data are.

    Paths are not part of the key. The machine is, because speeds that were measured on another one are no measure here.
    """
    from kdcli.export import own_graph
    from kdcli.models.checkpoint import weights_digest

    request = _request(step, model, step.common)
    found = [references.resolve(name, offline=step.common.offline) for name in preflight.models_of(request)]
    common = {k: v for k, v in asdict(step.common).items() if k not in ("out", "force", "resume", "debug")}
    settled = preflight.settle_data(request, found[0].path)
    dataset = preflight.load_data(settled, [found[0].path])
    read = [getattr(step.options, f.name) for f in fields(step.options)]
    graphs = [graph for one in found if (graph := own_graph.own_graph(one.path)) is not None]
    files = [path for path in (*graphs, *read) if isinstance(path, Path) and path.is_file()]
    key = cache.key(
        stage=step.stage,
        inputs=[weights_digest(one.path) for one in found],
        files=[io.sha256_of(path) for path in files],
        options=asdict(step.options),
        common=common,
        data=dataset.fingerprint,
        code=cache.code(),
        machine=[environment.cpu_name(), *environment.isa(), environment.threads()],
        dequantize=step.dequantize,
    )
    return key, str(settled.common.data)


def _copy(source: Path, target: Path, data: str, stage: str, *, force: bool) -> None:
    """Copy a kept output; its report says where the data are as seen from there."""
    size = sum(p.stat().st_size for p in source.iterdir())
    with (
        output.reserved(target, "", stage, force=force, inputs=()) as place,
        output.building(place, size) as work,
    ):
        shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(cache.SUMS))
        report = io.read(work)
        if (moved := recorded.moved(report.data, data, place)) != report.data:
            io.write(report.model_copy(update={"data": moved}), work)
        output.publish(work, place, force=force)
