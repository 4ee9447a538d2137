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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcli import cache
from kdcli.data import recorded
from kdcli.errors import ExitCode, InputError, did_you_mean, first_line
from kdcli.measure import environment
from kdcli.models import references
from kdcli.options import OptionError, declared
from kdcli.progress import Progress
from kdcli.report import facts, io
from kdcli.report.redact import redact
from kdcli.report.schema import Artifact, Report
from kdcli.request import STAGES, Common, Request, StageName
from kdcli.run import dry_run as plan
from kdcli.run import lined, output, preflight
from kdcli.stages import options

_LARGEST = 1 << 20
_SHARED = {
    one.argument: one for one in declared(Common).values() if one.flag.recipe and one.field != "settings"
}
"""Key -> an option that the recipe may name once for all of its stages."""

_BEFORE = "-"
"""The model of every stage but the first: what the one before has made."""


@dataclass
class RecipeOutcome:
    """What ``kdcli run`` hands back."""

    path: Path
    report: Report
    reports: list[Report]


def read(path: Path, argv: Sequence[str] = ()) -> list[Request]:
    """Read and check a recipe; every mistake in it is found before the first stage runs.

    Args:
        path: The recipe.
        argv: The command that runs it, for the reports of its stages; by default ``kdcli run RECIPE``.

    Returns:
        What its stages are asked for. The model of all but the first is :data:`_BEFORE`.

    Raises:
        InputError: The file is missing, broken, or has an unknown key or a wrong value; names the line and the stage.
    """
    content = _content(path)
    shared, lines = _keyed(content, path)
    stages = shared.pop("stages")
    for key in shared:
        if key not in (*_SHARED, "model"):
            known = (*_SHARED, "model", "stages")
            where = f"recipe '{path}', line {lines[key]}" if key in lines else f"recipe '{path}'"
            raise InputError(f"{where}: unknown key '{key}': {did_you_mean(key, known)}")
    model = shared.pop("model", None)
    argv = argv or ("kdcli", "run", redact(str(path)))
    steps: list[Request] = []
    for number, (entry, at) in enumerate(zip(stages, stages.lines, strict=True), 1):
        where = f"recipe '{path}', line {at}, stage {number}"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError(f"{where}: write it as STAGE: {{option: value}}")
        ((name, given),) = entry.items()
        if name not in STAGES:
            raise InputError(f"{where}: unknown stage '{name}': {did_you_mean(str(name), STAGES)}")
        if not isinstance(given or {}, dict):
            raise InputError(f"{where}: the options of {name} are not a mapping")
        if steps and name == "distill":
            raise InputError(f"recipe '{path}', line {at}: distill can only be the first stage")
        if not steps and name == "distill" and model is not None:
            raise InputError(f"recipe '{path}' names a 'model', but starts with distill, which has a teacher")
        if not steps and name != "distill" and not isinstance(model, str):
            raise InputError(f"recipe '{path}' starts with {name} but names no 'model'")
        of_stage, own = _keyed(given, path) if given else ({}, {})
        place = _Place(path, number, at, lines | own)
        steps.append(_step(place, name, shared | of_stage, _BEFORE if steps else model, argv))
    return steps


@dataclass(frozen=True)
class _Place:
    """A stage in a recipe."""

    path: Path
    number: int
    line: int
    lines: dict[str, int]  # of its keys, those that all stages share among them

    def of(self, key: str | None = None) -> str:
        """File, line and stage, for a message on one of its keys or on the whole of it."""
        return f"recipe '{self.path}', line {self.lines.get(key or '', self.line)}, stage {self.number}"


def _content(path: Path) -> lined.LinedMapping:
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"recipe '{path}' is larger than {_LARGEST >> 20} MiB")
        content = lined.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe '{path}' cannot be read: {error.strerror}") from error
    except lined.TwiceError as error:
        raise InputError(f"recipe '{path}', {error}", "leave one of the two out") from error
    except (lined.LinedError, UnicodeDecodeError) as error:
        raise InputError(f"recipe '{path}' is not YAML: {first_line(error)}") from error
    if (
        not isinstance(content, lined.LinedMapping)
        or not isinstance(content.get("stages"), lined.LinedList)
        or not content["stages"]
    ):
        raise InputError(f"recipe '{path}' has no list 'stages'", "see kdcli run --help for an example")
    return content


def run(
    path: Path,
    out: Path | None,
    force: bool,
    progress: Progress,
    dry_run: bool,
    argv: Sequence[str] = (),
) -> RecipeOutcome | plan.DryRun:
    """Run a recipe; a stage that misses a gate ends it.

    Args:
        path: The recipe.
        out: Directory for the outputs ``1-distill``, ``2-prune`` ...; by default ``kdcli-out/<recipe>``.
        force: Replace the outputs of an earlier run.
        progress: Observer.
        dry_run: Return the plan of the first stage, whose input exists already, and touch nothing.
        argv: The command, for the reports.
    """
    steps = read(path, argv)
    if dry_run:
        made = plan.plan(steps[0], progress)
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
        step = replace(step, model=model)
        name, place_of_data = _cache_key(step)
        kept = cache.entry("stages", name)
        progress.phase(f"stage {number} of {len(steps)}: {step.stage}")
        if writes:
            output.choose(target, "", step.stage, force=force, inputs=())
        if writes and cache.intact(kept):
            progress.note(f"{step.stage}: nothing changed, taken from the cache")
            _copy(kept, target, place_of_data, step, force=force)
            report = io.read(target)
        else:
            common = step.common.model_copy(update={"out": target if writes else None, "force": force})
            outcome = life.run(replace(step, common=common), progress)
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


def _step(
    place: _Place, stage: StageName, given: dict[str, Any], model: str | None, argv: Sequence[str]
) -> Request:
    """One stage of a recipe, checked.

    Raises:
        InputError: Names the stage in the recipe and the key.
    """
    keys = {one.argument: one for one in options.of_stage(stage).values() if one.flag.recipe}
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in keys:
            known = [one.name for one in keys.values()]
            raise InputError(
                f"{place.of(key)}: unknown option '{key}' of {stage}: {did_you_mean(key, known)}"
            )
        if value is None or value == "":
            # Taken for no value it would silently drop a gate, or judge something else.
            raise InputError(
                f"{place.of(key)}: '{keys[key].name}' has no value", "give one, or leave the line out"
            )
        found[keys[key].field] = value
    origins = dict.fromkeys(found, "recipe")
    if options.OPTIONS[stage].takes_model:
        found["model"] = model
    try:
        made = options.request(stage, found, origins=origins, argv=argv)
    except OptionError as error:
        named = next((key for key, one in keys.items() if one.field == error.field), None)
        said = error.said(options.spelt(stage, lambda one: one.name))
        raise InputError(f"{place.of(named)}: {said}") from error
    return replace(made, model=model)


def _key(name: Any) -> str:
    return str(name).replace("-", "_")


def _keyed(content: lined.LinedMapping, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping by its keys with underscores, and their lines where the recipe has them.

    Raises:
        InputError: A key is there with a hyphen and with an underscore.
    """
    lines: dict[str, int] = {}
    for name, line in content.lines.items():
        key = _key(name)
        if key in lines:
            raise InputError(
                f"recipe '{path}', line {line}: '{name}' is given twice, first in line {lines[key]}",
                "leave one of the two out",
            )
        lines[key] = line
    return {_key(name): value for name, value in content.items()}, lines


def _cache_key(request: Request) -> tuple[str, str]:
    """Everything that decides a stage's output and the numbers in its report, and where its data are.

    Paths are not part of the key. The machine is, because speeds that were measured on another one are no measure here.
    """
    from kdcli.export import own_graph
    from kdcli.models.checkpoint import weights_digest

    offline = request.common.offline
    found = [references.resolve(name, offline=offline) for name in preflight.models_of(request)]
    common = request.common.model_dump(exclude={"out", "force", "resume"})
    settled = preflight.settle_data(request, found[0].path)
    dataset = preflight.load_data(settled, [found[0].path])
    read = [value for _, value in request.options]
    graphs = [graph for one in found if (graph := own_graph.own_graph(one.path)) is not None]
    files = [path for path in (*graphs, *read) if isinstance(path, Path) and path.is_file()]
    key = cache.key(
        stage=request.stage,
        inputs=[weights_digest(one.path) for one in found],
        files=[io.sha256_of(path) for path in files],
        options=request.options.model_dump(),
        common=common,
        data=dataset.fingerprint,
        code=cache.code(),
        machine=[environment.cpu_name(), *environment.isa(), environment.threads()],
    )
    return key, str(settled.common.data)


def _copy(source: Path, target: Path, data: str, step: Request, *, force: bool) -> None:
    """Copy a kept output; its report says where the data are as seen from there, and which command took it."""
    size = sum(p.stat().st_size for p in source.iterdir())
    with (
        output.reserved(target, "", step.stage, force=force, inputs=()) as place,
        output.building(place, size) as work,
    ):
        shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(cache.SUMS))
        report = io.read(work)
        taken = _taken(report, [redact(part) for part in step.argv], work)
        io.write(taken.model_copy(update={"data": recorded.moved(report.data, data, place)}), work)
        output.publish(work, place, force=force)


def _taken(made: Report, command: list[str], work: Path) -> Report:
    """The report of a kept output under the command that took it, in its model card, too.

    The detail of its method has the command that made it.
    """
    report = made.model_copy(update={"command": command})
    if made.method is not None:
        detail = made.method.detail | {"recipe_cache": {"made_by": made.command, "made_at": made.created_at}}
        report = report.model_copy(update={"method": made.method.model_copy(update={"detail": detail})})
    page = work / "README.md"
    if made.command and page.is_file():
        content = page.read_text(encoding="utf-8")
        content = content.replace(facts.command_text(made), facts.command_text(report), 1)
        page.write_text(content, encoding="utf-8")
        own = Artifact(path=page.name, bytes=page.stat().st_size, sha256=io.sha256_of(page))
        artifacts = [own if one.path == page.name else one for one in made.artifacts]
        report = report.model_copy(update={"artifacts": artifacts})
    return report
