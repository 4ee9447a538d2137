"""The options of every stage, and the one way from what was given to a :class:`~kdcli.request.Request`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from kdcli.errors import KdcliError, did_you_mean
from kdcli.options import Declared, OptionError, Options, declared
from kdcli.request import Common, Gates, OneModel, Request, StageName, StageOptions
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions

OPTIONS: dict[StageName, type[StageOptions]] = {
    "distill": DistillOptions,
    "prune": PruneOptions,
    "lowrank": LowRankOptions,
    "quantize": QuantizeOptions,
    "evaluate": EvaluateOptions,
}


@cache
def of_stage(stage: StageName) -> dict[str, Declared]:
    """Every option of a stage by field, in the order of its help: its own, the gates, what all stages have."""
    own = OPTIONS[stage]
    parts: list[type[Options]] = [*([OneModel] if own.takes_model else []), own, Gates, Common]
    every = {name: one for part in parts for name, one in declared(part).items()}
    return {name: one for name, one in every.items() if name not in own.without}


def spelt(stage: StageName, how: Callable[[Declared], str]) -> Callable[[str], str]:
    """Make a function that writes the name of a field in one way, such as ``how=lambda one: f"--{one.name}"``."""
    every = of_stage(stage)
    return lambda field: how(every[field]) if field in every else field


def request(
    stage: StageName, given: Mapping[str, Any], *, origins: Mapping[str, str], argv: Iterable[str] = ()
) -> Request:
    """Check what was given, wherever it comes from, and sort it into a request.

    Args:
        stage: The stage.
        given: Field -> value, without those that were not given.
        origins: Field -> flag, environment, file, recipe or argument.
        argv: The command, as the report repeats it.

    Raises:
        OptionError: An option that is unknown, missing or out of range, or a combination that means nothing.
    """
    kind, every = OPTIONS[stage], of_stage(stage)
    for name in given:
        if name not in every:
            raise OptionError(None, f"unknown option '{name}' of {stage}: {did_you_mean(name, every)}")

    def part(options: type[Options]) -> dict[str, Any]:
        return {name: given[name] for name in declared(options) if name in given}

    options = kind(**part(kind))
    model = OneModel(**part(OneModel)).model if kind.takes_model else None
    common = Common(**part(Common), gates=Gates(**part(Gates)))
    return Request(
        stage=stage, model=model, options=options, common=common, argv=tuple(argv), origins=dict(origins)
    )


def fields_of(
    stage: StageName,
    given: Mapping[str, Any],
    how: Callable[[Declared], str],
    unknown: Callable[[str, list[str]], KdcliError],
) -> dict[str, Any]:
    """What was given under the names of one way in, by field.

    Args:
        stage: The stage.
        given: Name -> value.
        how: The name of an option in this way.
        unknown: Makes the error for a name that there is not, of it and of those that there are.

    Raises:
        KdcliError: What ``unknown`` has made.
    """
    names = {how(one): field for field, one in of_stage(stage).items()}
    for name in given:
        if name not in names:
            raise unknown(name, list(names))
    return {names[name]: value for name, value in given.items()}
