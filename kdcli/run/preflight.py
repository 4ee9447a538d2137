"""What can be found wrong with a request before torch is loaded, in well under a second."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli import tasks
from kdcli.data import recorded as recorded_data
from kdcli.data import sources
from kdcli.data.sources import Dataset, Judging
from kdcli.data.wanted import Wanted
from kdcli.errors import InputError, UsageError
from kdcli.models import foreign, references
from kdcli.models.references import Resolved
from kdcli.progress import Progress
from kdcli.report import gates, io
from kdcli.report.schema import DataInfo
from kdcli.request import DEFAULT_DATA, SPLIT_SEED, SUCCESSORS, Request
from kdcli.run import output
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions


def models_of(request: Request) -> list[str]:
    """The references of every model that a request reads; the first is the one it works on.

    Raises:
        UsageError: There is none.
    """
    options = request.options
    if isinstance(options, DistillOptions):
        return list(options.teachers)
    names: list[str] = [request.model] if request.model else []
    if isinstance(options, EvaluateOptions):
        names = list(options.models) or names
        if options.baseline is not None and names:
            names.append(options.baseline)
    if not names:
        raise UsageError(f"{request.stage} needs a model")
    return names


def check_chain(request: Request, path: Path) -> None:
    """Refuse an illegal order of stages.

    Raises:
        UsageError: The model is stored as integers and the stage needs dense weights.
        InputError: Its kdcli.json is not readable.
    """
    log = path / "kdcli.json"
    if not log.is_file() or request.dequantize or request.stage in SUCCESSORS["quantize"]:
        return
    try:
        transforms = json.loads(log.read_text(encoding="utf-8"))["transforms"]
        quantised = [t["scheme"] for t in transforms if t["op"] == "quantise"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{log} is not a transform log that this kdcli can read: {_said(error)}") from error
    if quantised:
        again = request.stage == "quantize"
        order = (
            "quantise the model that it was made from" if again else f"run {request.stage} before quantize"
        )
        raise UsageError(
            f"{request.stage} needs dense weights, but '{path}' was quantised ({quantised[-1]})",
            f"{order}, or pass --dequantize to work on the rounded weights",
        )


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, TypeError):
        return "it is not an object with a list of transforms"
    return str(error) or type(error).__name__


def place(request: Request, found: Sequence[Resolved]) -> Path | None:
    """Where the output goes; None for an ``evaluate`` that writes no directory.

    Raises:
        UsageError: The place is taken, or is one of the inputs.
    """
    wanted = _wanted(request, found)
    return None if wanted is None else output.choose(**wanted)


@contextlib.contextmanager
def reserved(request: Request, found: Sequence[Resolved]) -> Iterator[Path | None]:
    """:func:`place`, kept free of other runs inside the block.

    Raises:
        UsageError: The place is taken, or is one of the inputs, or another run writes there.
        ResourceError: It cannot be written.
    """
    wanted = _wanted(request, found)
    if wanted is None:
        yield None
        return
    with output.reserved(**wanted) as path:
        yield path


def _wanted(request: Request, found: Sequence[Resolved]) -> dict[str, Any] | None:
    """What :func:`output.choose` has to know."""
    common = request.common
    if isinstance(request.options, EvaluateOptions):
        if common.out is None:
            return None
        if len(request.options.models) > 1:
            raise UsageError("-o takes one model; several models are reported by --json or --html")
    name = Path(found[0].ref.partition("@")[0]).name or "model"
    inputs = tuple(one.path for one in found)
    return {
        "out": common.out,
        "model_name": name,
        "stage": request.stage,
        "force": common.force,
        "inputs": inputs,
    }


def settle_data(request: Request, model: Path) -> Request:
    """Fill in the data: what was asked for, else what the model's own report names, else the default.

    The result is what the stage records, so that the next one in the chain finds it again.
    """
    common, origins = request.common, dict(request.origins)
    if common.data is not None:
        return request
    data, columns, origin, recorded = DEFAULT_DATA, common.columns, "default", None
    if (model / io.FILE).is_file() and (earlier := io.read(model)).data is not None:
        recorded = recorded_data.find(earlier.data, model)
        data, origin = recorded.place, "model"
        stored = earlier.config.get("columns")
        if columns is None and stored is not None and stored.value is not None:
            columns, origins["columns"] = str(stored.value), "model"
    origins["data"] = origin
    settled = common.model_copy(update={"data": data, "columns": columns})
    return replace(request, common=settled, origins=origins, recorded=recorded)


def _resolve(ref: str, request: Request) -> Resolved:
    """Where a model is; only what judges takes a graph by itself."""
    graph = references.resolve_graph(ref) if request.stage == "evaluate" else None
    return graph or references.resolve(ref, offline=request.common.offline)


def load_data(request: Request, models: Sequence[Path]) -> Dataset:
    """Load the data of a request that :func:`settle_data` has filled in.

    Args:
        request: Its stage says whether the rows are to be learned from or judged.
        models: Every model that the request reads, which tells what was held out when it was made.
    """
    common, options = request.common, request.options
    assert common.data is not None
    judging = None
    if isinstance(options, EvaluateOptions):
        made = {path: info for path in models if (info := _made_with(path)) is not None}
        judging = Judging(
            split=options.split,
            made_with=frozenset(info.fingerprint for info in made.values()),
            made_from=frozenset(
                os.path.realpath(info.ref if info.path is None else path / info.path)
                for path, info in made.items()
                if "train" in info.rows
            ),
            as_made=request.origins.get("data") == "model"
            and models[0] in made
            and "train" in made[models[0]].rows,
        )
    dataset = sources.load(
        common.data,
        columns=common.columns,
        seed=SPLIT_SEED,
        offline=common.offline,
        judging=judging,
        wanted=wanted_of(request, models),
    )
    return recorded_data.checked(dataset, request.recorded)


def wanted_of(request: Request, models: Sequence[Path]) -> Wanted | None:
    """What an answer is, as ``--task`` or the models say; None where the data decide.

    Raises:
        InputError: Two of them contradict each other.
    """
    said = {} if request.common.task is None else {f"--task {request.common.task}": request.common.task}
    said |= {f"the model '{path}'": task for path in models if (task := foreign.task_of(path)) is not None}
    name = tasks.agreed(said)
    by = next(iter(said), "")
    return None if name is None else Wanted(tasks.kind_of(name), by, of_model=by != f"--task {name}")


def _made_with(model: Path) -> DataInfo | None:
    """The data that a model's own report names; None for a model that has no report of kdcli's."""
    if not (model / io.FILE).is_file():
        return None
    try:
        return io.read(model).data
    except InputError:
        return None


def check(request: Request) -> list[Resolved]:
    """Resolve every model, check the chain and the output's place.

    Raises:
        KdcliError: Whatever would stop the run before its work begins.
    """
    gates.check_drop(request.common.gates, request.common.metric)
    found = [_resolve(name, request) for name in models_of(request)]
    for one in found:
        # What has no weights is told when it is loaded; a graph that was named is judged without them, if need be.
        if one.graph is None and any(one.path.glob("*.safetensors")):
            foreign.check(one.path)
    check_chain(request, found[0].path)
    place(request, found)
    return found


def told_data(request: Request, models: Sequence[Path], progress: Progress) -> Dataset:
    """:func:`load_data`, and say what there is to say of the data."""
    common = request.common
    assert common.data is not None
    said = {"default": "the default; --data names another", "model": "as in the model's own report"}
    if (origin := request.origins.get("data", "flag")) in said:
        progress.note(f"data: {common.data} ({said[origin]})")
    dataset = load_data(request, models)
    for note in dataset.notes:
        progress.note(note)
    return dataset
