"""From a stage's options to its exit code: one Request, one run, one line on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer

from kdcli import cache, interrupts, memory, processes
from kdcli.cli import console as consoles
from kdcli.cli import streams
from kdcli.cli.command import origin, variable_of
from kdcli.errors import ExitCode, InputError, UsageError
from kdcli.report.redact import redact

if TYPE_CHECKING:
    from kdcli.options import Declared
    from kdcli.report.schema import Report
    from kdcli.request import Request, StageName, StageOptions

_ORDER = ("default", "file", "environment", "flag")


def execute(ctx: typer.Context, name: StageName) -> None:
    """Run one stage and end the process as its report says.

    Raises:
        typer.Exit: A gate was missed, or the export does not agree.
        KdcliError: Whatever stopped it.
    """
    given = ctx.params
    request = _piped(_request(ctx, name))
    quiet = given["quiet"] or not processes.first()
    with session(f"kdcli {name}", quiet=quiet, verbose=given["verbose"]) as (console, stdout):
        # Only now, with stdin read, is anything heavy worth its seconds.
        if given["dry_run"]:
            from kdcli.run import dry_run as plan

            show_plan(console, stdout, plan.plan(request, console), as_json=given["as_json"])
        else:
            from kdcli.run import preflight

            found = preflight.check(
                request
            )  # a model that is not here, a taken output: said before torch is loaded
            with cached(console):
                with memory.loading():
                    from kdcli.run import life

                outcome = life.run(request, console, found)
            if outcome is None:  # another process of this run speaks
                return
            interrupts.check()  # a run that was told to stop prints no path
            reports = outcome.reports if name == "evaluate" else [outcome.report]
            finish(console, stdout, outcome, reports, as_json=given["as_json"])


@contextlib.contextmanager
def session(prefix: str, *, quiet: bool, verbose: bool) -> Iterator[tuple[consoles.Console, TextIO]]:
    """Yield the console and the real stdout; inside, nothing but us speaks unless ``verbose``."""
    console = consoles.make(prefix, quiet=quiet, verbose=verbose)
    # Read by torch's OpenMP when it loads: wait actively for some microseconds, then sleep. Measured for a step of
    # a 2x128 student on two cores, with two other busy processes: 377 ms as OpenMP waits by itself, 56 so;
    # on an idle machine 25 and 20.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with streams.guarded() as stdout:
        if verbose:
            yield console, stdout
            return
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if quiet or not console.terminal:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with warnings.catch_warnings(record=True) as caught:
            yield console, stdout
        if caught:
            word = "warning" if len(caught) == 1 else "warnings"
            console.line(f"{len(caught)} {word} of libraries not shown (-v shows them)")


@contextlib.contextmanager
def cached(console: consoles.Console) -> Iterator[None]:
    """Say so where the cache cannot be written and a temporary one is used.

    Raises:
        ResourceError: ``KDCLI_CACHE`` cannot be written.
    """
    with cache.writable() as reason:
        if reason is not None:
            console.note(reason)
        yield


def show_plan(console: consoles.Console, stdout: TextIO, plan: Any, *, as_json: bool) -> None:
    """The plan for people, and with ``as_json`` on stdout too."""
    for line in plan.lines():
        console.line(consoles.clean(line))
    if as_json:
        streams.put(stdout, json.dumps(plan.to_json(), indent=2, ensure_ascii=False, default=str))


def finish(
    console: consoles.Console, stdout: TextIO, outcome: Any, reports: Sequence[Report], *, as_json: bool
) -> None:
    """Show what came out; print the path, or with ``as_json`` the report (a list of them for several models).

    Raises:
        typer.Exit: The report's verdict is not 0.
    """
    from kdcli.cli import table

    single = len(reports) == 1
    for line in table.of_report(reports[0], console) if single else table.of_several(reports, console):
        console.line(line)
    code = outcome.report.exit_code
    # Judging alone writes nothing: the path is then that of the input.
    written = reports[0].stage != "evaluate" or bool(reports[0].artifacts)
    kept = f"the output is kept in {outcome.path}" if written else None
    if code == ExitCode.PARITY:
        console.error("the ONNX export does not agree with the checkpoint", kept)
    elif code:
        missed = [gate.expression for one in reports for gate in one.gates if not gate.passed]
        console.error(f"{'gate' if len(missed) == 1 else 'gates'} missed: {'; '.join(missed)}", kept)
    else:
        from kdcli.report import facts

        where = f", {consoles.clean(str(outcome.path))}" if single else ""
        console.line(f"{console.prefix}: done in {console.elapsed()}{where}")
        for one in reports:
            if (words := facts.alarm(one)) is not None:
                name = "" if single else f"{consoles.clean(one.model.source)}: "
                console.error(f"WARNING: {name}{words}")
    if as_json:
        documents = [one.model_dump(mode="json") for one in reports]
        document = documents[0] if single else documents
        streams.put(stdout, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif not code:
        # Of several models the references as they were given: the chain goes on with all of them.
        streams.put(stdout, str(outcome.path) if single else "\n".join(one.model.source for one in reports))
    if code:
        raise typer.Exit(code)


def _request(ctx: typer.Context, name: StageName) -> Request:
    """What the command line, the environment and the settings file ask for.

    Raises:
        UsageError: A flag or a variable that cannot be.
        InputError: A value of the settings file that cannot be.
    """
    from kdcli.options import OptionError
    from kdcli.stages import options

    every = options.of_stage(name)
    origins = {field: origin(ctx, field) for field in every}
    given = {field: ctx.params[field] for field, where in origins.items() if where != "default"}
    given = _nearest(options.OPTIONS[name], given, origins)

    def spelt(one: Declared) -> str:
        if origins[one.field] == "environment":
            return variable_of(one.name)
        if origins[one.field] == "file":
            return one.name
        return str(one.flag.metavar) if one.flag.argument else f"--{one.name}"

    try:
        return options.request(
            name, given, origins=origins, argv=("kdcli", *(redact(word) for word in ctx.obj["words"]))
        )
    except OptionError as error:
        said = error.said(options.spelt(name, spelt))
        if error.field is not None and origins[error.field] == "file":
            raise InputError(f"settings file: {consoles.clean(said)}") from error
        raise UsageError(consoles.clean(said), f"kdcli {name} --help shows the options") from error


def _nearest(kind: type[StageOptions], given: dict[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """Leave out what something said nearer has put out of force: a flag before the environment before the file.

    Of options that exclude each other those said nearest stay, and one that needs another, from the environment or the
    file, stays with that one alone.
    """
    rank = {field: _ORDER.index(origins[field]) for field in given}
    best = max((rank[field] for field in kind.exclusive if field in given), default=0)
    lost = {field for field in kind.exclusive if field in given and rank[field] < best}
    for field, other in kind.needs.items():
        idle = str(given.get(other, "0")).strip() == "0"
        if field in given and idle and origins[field] != "flag":
            lost.add(field)
    return {field: value for field, value in given.items() if field not in lost}


def _piped(request: Request) -> Request:
    """Put what stdin says in the place of ``-``."""
    from kdcli.stages.distill.options import DistillOptions
    from kdcli.stages.evaluate.options import EvaluateOptions

    options = request.options
    if isinstance(options, DistillOptions):
        teachers = tuple(streams.reference(name) for name in options.teachers)
        return dataclasses.replace(request, options=options.model_copy(update={"teachers": teachers}))
    if isinstance(options, EvaluateOptions):
        models = tuple(found for name in options.models for found in streams.references(name))
        baseline = None if options.baseline is None else streams.reference(options.baseline)
        found = options.model_copy(update={"models": models, "baseline": baseline})
        return dataclasses.replace(request, options=found)
    assert request.model is not None
    return dataclasses.replace(request, model=streams.reference(request.model))
