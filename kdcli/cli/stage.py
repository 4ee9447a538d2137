"""From a stage's options to its exit code: one Request, one run, one line on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import typer

from kdcli.cli import console as consoles
from kdcli.cli import streams, values
from kdcli.cli.command import flag_of, origin
from kdcli.errors import ExitCode, UsageError
from kdcli.report.redact import redact
from kdcli.stages.base import Common, DistillOptions, EvaluateOptions, Gates, Options, Request, StageName

_ORDER = ("default", "file", "environment", "flag")


def exclusive(ctx: typer.Context, **given: Any) -> tuple[Any, ...]:
    """Of options that exclude each other keep the one that was said nearest (flag before environment before file).

    Raises:
        UsageError: Two of them come from the same place.
    """
    named = [name for name, value in given.items() if value is not None]
    best = max((_ORDER.index(origin(ctx, name)) for name in named), default=0)
    kept = [name for name in named if _ORDER.index(origin(ctx, name)) == best]
    if len(kept) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in kept)} exclude each other; give one")
    return tuple(value if name in kept else None for name, value in given.items())


def execute(
    ctx: typer.Context, name: StageName, options: Options, *, model: str | None = None, dequantize: bool = False
) -> None:
    """Run one stage and end the process as its report says.

    Raises:
        typer.Exit: A gate was missed, or the export does not agree.
        KdcliError: Whatever stopped it.
    """
    given = ctx.params
    request = Request(
        stage=name,
        model=None if model is None else streams.reference(model),
        options=_piped(options),
        common=_common(given),
        argv=("kdcli", *(redact(word) for word in sys.argv[1:])),
        origins={key: origin(ctx, key) for key in given},
        dequantize=dequantize,
    )
    console = consoles.make(f"kdcli {name}", quiet=given["quiet"], verbose=given["verbose"])
    with streams.guarded() as stdout:
        if given["dry_run"]:
            from kdcli.stages import plan

            planned = plan.plan(request, console)
            for line in planned.lines():
                console.line(consoles.clean(line))
            if given["as_json"]:
                streams.put(stdout, json.dumps(planned.to_json(), indent=2, ensure_ascii=False))
            return
        from kdcli.stages import runner

        outcome = runner.run(request, console)
        finish(console, stdout, outcome, as_json=given["as_json"])


def finish(console: consoles.Console, stdout: Any, outcome: Any, *, as_json: bool) -> None:
    """Show what came out; print the path, or with ``as_json`` the report.

    Raises:
        typer.Exit: The report's verdict is not 0.
    """
    from kdcli.cli import table

    report, reports = outcome.report, list(getattr(outcome, "reports", None) or [outcome.report])
    lines = table.of_report(report, console) if len(reports) == 1 else table.of_several(reports, console)
    for line in lines:
        console.line(line)
    code = report.exit_code
    if code:
        missed = [gate for one in reports for gate in one.gates if not gate.passed]
        what = "the ONNX export does not agree with the checkpoint" if code == ExitCode.PARITY else (
            f"{len(missed)} gate{'s' if len(missed) > 1 else ''} missed: {'; '.join(g.expression for g in missed)}"
        )
        console.error(what, f"the output is kept in {outcome.path}")
    if as_json:
        documents = [one.model_dump(mode="json") for one in reports]
        document = documents[0] if len(documents) == 1 else documents
        streams.put(stdout, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif not code:
        # Several models: the references as they were given, because the chain goes on with them.
        streams.put(stdout, str(outcome.path) if len(reports) == 1 else "\n".join(r.model.source for r in reports))
    if code:
        raise typer.Exit(code)


def _common(given: dict[str, Any]) -> Common:
    gates = Gates(
        max_drop=given["max_drop"],
        min_speedup=given["min_speedup"],
        max_size_bytes=given["max_size_bytes"],
        expressions=tuple(given["expressions"] or ()),
    )
    plain = {f.name: given[f.name] for f in dataclasses.fields(Common) if f.name not in ("settings", "gates")}
    return Common(**plain, settings=values.pairs(given["settings"]), gates=gates)


def _piped(options: Options) -> Options:
    """Put what stdin says in the place of ``-`` among several models."""
    if isinstance(options, DistillOptions):
        teachers = tuple(streams.reference(name) for name in options.teachers)
        return dataclasses.replace(options, teachers=teachers)
    if isinstance(options, EvaluateOptions):
        models = tuple(found for name in options.models for found in streams.references(name))
        baseline = None if options.baseline is None else streams.reference(options.baseline)
        return dataclasses.replace(options, models=models, baseline=baseline)
    return options


__all__ = ["execute", "exclusive", "finish", "flag_of"]
