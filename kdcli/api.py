"""The stages as functions: ``kdcli.distill(teacher="minilm", student="tiny", data="reviews/")``.

A call does what the command does and returns its report. Only what is passed counts: no ``KDCLI_`` variable and no
kdcli.toml gives an option here. See docs/python.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from kdcli import cache, interrupts, processes
from kdcli.errors import ExitCode, InterruptedRun, UsageError, did_you_mean
from kdcli.models import references
from kdcli.options import Declared, OptionError
from kdcli.progress import Progress
from kdcli.report.redact import redact
from kdcli.report.schema import Report
from kdcli.request import STAGES, Request, StageName
from kdcli.run import preflight
from kdcli.stages import options


def _run(stage: StageName, given: Mapping[str, Any], progress: Progress | None) -> list[Report]:
    """Run one stage, and say in every report where its output is.

    Raises:
        UsageError: An argument that cannot be; the message names it.
        KdcliError: Whatever stopped the stage.
    """
    if processes.count() > 1:
        raise UsageError(
            f"kdcli.{stage}() runs in one process", "several share a training through the command alone"
        )
    request = request_of(stage, given)
    found = preflight.check(request)  # a model that is not here, a taken output: said before torch is loaded
    with _interruptible():
        from kdcli.run import life

        outcome = life.run(request, progress or Progress(), found)
    assert outcome is not None  # there is one process
    reports = outcome.reports if stage == "evaluate" else [outcome.report]
    for report in reports:
        if report.artifacts:  # judging alone writes nothing
            report.written_to(outcome.path)
    return reports


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What a signal stops ends as Python itself has it."""
    try:
        with interrupts.installed(), cache.writable():
            yield
            interrupts.check()
    except InterruptedRun as stop:
        if stop.exit_code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt from stop
        raise SystemExit(int(stop.exit_code)) from stop


def predict(
    model: str | PathLike[str],
    texts: Iterable[str] | Iterable[Sequence[str]],
    *,
    top: int | None = None,
    batch_size: int = 32,
    runtime: Literal["onnx", "torch"] = "onnx",
    device: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, object]]:
    """What ``kdcli predict`` answers, one dictionary a text.

    Args:
        model: A directory, an alias or ``org/name[@revision]``.
        texts: Texts, or pairs of texts.
        top: Also the scores of this many labels, best first.
        batch_size: Rows that the model gets at once.
        runtime: What runs the model.
        device: ``auto``, ``cpu``, ``cuda[:N]`` or ``mps``.
        offline: Open no connection.
        progress: Is told what is out of the ordinary; silent by default.

    Raises:
        KdcliError: What would end the command.
    """
    if isinstance(texts, str):
        raise UsageError("kdcli.predict(): texts is a list of texts, not one text", "put it into a list")
    for name, number in (("top", top), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise UsageError(f"kdcli.predict(): {name} must be at least 1, not {number}")
    if runtime not in ("onnx", "torch"):
        raise UsageError(f"kdcli.predict(): runtime is onnx or torch, not {runtime!r}")
    said = progress or Progress()
    ref = str(model)
    found = references.resolve_graph(ref) or references.resolve(ref, offline=offline, progress=said)
    with _interruptible():
        from kdcli.data import streamed
        from kdcli.run import predicting

        how = predicting.PredictOptions(
            batch_size=batch_size, top=top, torch=runtime == "torch", device=device
        )
        parts = predicting.answers(found, lambda _: streamed.of_texts(texts), how, said)
        return [answer for part in parts for answer in part]


def request_of(stage: StageName, given: Mapping[str, Any]) -> Request:
    """The request of a call; an argument that is None was not given.

    Raises:
        UsageError: An argument that there is not, or a value that it cannot have.
    """

    def unknown(name: str, known: list[str]) -> UsageError:
        return UsageError(f"kdcli.{stage}() has no argument '{name}': {did_you_mean(name, known)}")

    passed = {name: value for name, value in given.items() if value is not None}
    found = options.fields_of(stage, passed, lambda one: one.argument, unknown)
    try:
        made = options.request(stage, found, origins=dict.fromkeys(found, "argument"))
    except OptionError as error:
        spelt = options.spelt(stage, lambda one: one.argument)
        raise UsageError(f"kdcli.{stage}(): {error.said(spelt)}") from error
    values = {**dict(made.common), **dict(made.common.gates), **dict(made.options), "model": made.model}
    return dataclasses.replace(made, argv=_command(stage, {name: values[name] for name in found}))


def _command(stage: StageName, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The command that does the same, for the report."""
    words = ["kdcli", stage]
    for field, one in options.of_stage(stage).items():
        if field in values:
            words += _words(one, values[field])
    return tuple(redact(word) for word in words)


def _words(one: Declared, value: Any) -> list[str]:
    flag = f"--{one.name}"
    if one.kind == "flag":
        return [flag] if value else [f"--no-{one.name}"] if one.flag.off else []
    if one.flag.argument:
        return [*value] if one.kind == "many" else [str(value)]
    if isinstance(value, Mapping):
        return [word for key, each in value.items() for word in (flag, f"{key}={each}")]
    if one.kind == "many":
        return [word for each in value for word in (flag, str(each))]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def _positional(stage: StageName) -> str | None:
    """The argument that may be passed without its name."""
    return next((one.argument for one in options.of_stage(stage).values() if one.flag.argument), None)


def _function(stage: StageName) -> Callable[..., Any]:
    """Make the function of a stage, with a signature and a docstring made from its options."""
    first = _positional(stage)

    def call(*args: Any, progress: Progress | None = None, **given: Any) -> Any:
        if len(args) > (first is not None) or (args and first in given):
            raise TypeError(f"kdcli.{stage}() takes its options by name")
        if args and first is not None:
            given = {first: args[0], **given}
        if first is not None and given.get(first) is None:
            raise UsageError(f"kdcli.{stage}(): {first} is missing")
        reports = _run(stage, given, progress)
        several = stage == "evaluate" and isinstance(given["models"], list | tuple)
        return reports if several else reports[0]

    every = options.of_stage(stage).values()
    call.__name__ = call.__qualname__ = stage
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(_parameter(one) for one in every),
            inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Progress),
        ]
    )
    told = "\n".join(f"    {one.argument}: {one.help}" for one in every)
    call.__doc__ = (
        f"What ``kdcli {stage}`` does, and its report.\n\n"
        "A gate that is missed raises nothing: ``report.exit_code`` says it.\n\n"
        f"Args:\n{told}\n    progress: Is told what happens; silent by default.\n\n"
        "Raises:\n    KdcliError: What would end the command."
    )
    return call


def _parameter(one: Declared) -> inspect.Parameter:
    kinds = inspect.Parameter
    return kinds(
        one.argument,
        kinds.POSITIONAL_OR_KEYWORD if one.flag.argument else kinds.KEYWORD_ONLY,
        default=kinds.empty
        if one.info.is_required() or one.flag.argument
        else one.info.get_default(call_default_factory=True, validated_data={}),
        annotation=one.info.annotation,
    )


FUNCTIONS: dict[str, Callable[..., Any]] = {stage: _function(stage) for stage in STAGES} | {
    "predict": predict
}
"""What ``kdcli`` offers by the names of the commands."""
