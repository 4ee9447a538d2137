"""The registry of methods: a file in a stage's folder of methods is a method, its name is the file's.

Every file ends in ``METHOD``, one object that says what the method is: a :class:`MethodSpec` of its stage's own kind
(``Loss``, ``Criterion``, ``LinearRule`` or ``ConvolutionRule``, ``Scheme``, ``WeightRounding``).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli.docstrings import first_line_of, text_of
from kdcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcli.tasks.task import Kind, Task

FOLDERS: dict[str, str] = {
    "distill": "training/losses",
    "prune": "stages/prune/criteria",
    "quantize": "stages/quantize/schemes",
    "lowrank": "stages/lowrank/rules",
    "rounding": "stages/quantize/rounding",
    "smoothing": "stages/quantize/smoothing",
}
"""Stage, or what its methods choose among, -> folder below this file's. Losses lie a floor down: every stage's
recovery uses some."""

METHOD_STAGES = ("distill", "prune", "quantize", "lowrank")

INGREDIENTS: dict[str, tuple[str, ...]] = {"quantize": ("rounding", "smoothing")}
"""Stage -> folders of what its methods choose among."""

ANSWERS: dict[Kind, str] = {
    "one-of": "one of several labels",
    "any-of": "any of several labels",
    "number": "a number",
}
"""Kind of a task's answers -> in words."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What every method says of itself; the methods of a stage say more, in a class of their own."""

    config: type[BaseModel]  # its parameters
    answers: tuple[Kind, ...] = tuple(ANSWERS)  # that it can work with
    because: str = ""  # why with no others: a sentence
    instead: str = ""  # methods of its stage for the others, as the command line has them

    def configured(self, settings: Mapping[str, str]) -> Any:
        """Make its ``config`` from ``--set`` strings; see :func:`parse_config`."""
        return parse_config(self.config, settings)

    @property
    def settings(self) -> frozenset[str]:
        """Keys that ``--set`` has for it."""
        return frozenset(self.config.model_fields)


Declared = TypeVar("Declared", bound=MethodSpec)

_KINDS = {"distill": "loss", "prune": "criterion", "quantize": "scheme", "lowrank": "rule"}


def kinds(stage: str) -> list[tuple[str, str]]:
    """Folders of a stage as keys of :data:`FOLDERS`, each with what its files are."""
    return [(stage, _KINDS[stage]), *((folder, folder) for folder in INGREDIENTS.get(stage, ()))]


@lru_cache(maxsize=8)
def names(stage: str) -> tuple[str, ...]:
    """Method names of a stage, sorted, found without importing any of them."""
    folder = Path(__file__).parent / FOLDERS[stage]
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules([str(folder)])))


def load_name(stage: str, name: str) -> str:
    """Return the name of a method that exists, without importing it.

    Raises:
        UsageError: There is no such method in this stage.
    """
    if name not in names(stage):
        raise UsageError(f"unknown {stage} method '{name}': {did_you_mean(name, names(stage))}")
    return name


def load(stage: str, name: str, kind: type[Declared]) -> Declared:
    """Import a method and return what it declares; raises as :func:`load_name` does.

    Args:
        stage: Or another key of :data:`FOLDERS`.
        name: Of the method.
        kind: What the methods of this stage are.
    """
    load_name(stage, name)
    place = f"kdcli.{FOLDERS[stage].replace('/', '.')}.{name.replace('-', '_')}"
    found = importlib.import_module(place).METHOD
    if not isinstance(found, kind):
        raise TypeError(f"METHOD of {place} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def need_answers(methods: Mapping[str, MethodSpec], task: Task) -> None:
    """Refuse methods that cannot work with the answers of a task.

    Args:
        methods: Those that were chosen, by name.
        task: What the model answers.

    Raises:
        UsageError: Says which method, why, and what to use.
    """
    for name, method in methods.items():
        if task.kind not in method.answers:
            able = " or ".join(ANSWERS[one] for one in method.answers)
            raise UsageError(
                f"method '{name}' is for answers that are {able}, and those of the task {task.name} are "
                f"{ANSWERS[task.kind]}: {method.because}",
                f"use --method {method.instead}" if method.instead else None,
            )


def text(stage: str, name: str) -> str:
    """A method's docstring, read without importing it."""
    return text_of(_file(stage, name))


def summary(stage: str, name: str) -> str:
    """First line of a method's docstring, read without importing it."""
    return first_line_of(_file(stage, name))


def _file(stage: str, name: str) -> Path:
    return Path(__file__).parent / FOLDERS[stage] / f"{name.replace('-', '_')}.py"


def share_out(
    stage: str,
    given: Mapping[str, str],
    methods: Mapping[str, MethodSpec],
    own: type[BaseModel] | None = None,
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Say who takes which ``--set``.

    A plain ``key`` goes to the stage where that has it, else to every chosen method that has it; ``method.key`` goes
    to that method alone, and a plain one never takes its place.

    Args:
        stage: Whose methods these are.
        given: As the command line had them.
        methods: Those that were chosen, by name.
        own: Settings of the stage itself.

    Returns:
        What the stage takes, and for every method what it takes.

    Raises:
        UsageError: Nobody takes a key; says who would.
    """
    keys = frozenset() if own is None else frozenset(own.model_fields)
    for_stage: dict[str, str] = {}
    for_method: dict[str, dict[str, str]] = {name: {} for name in methods}
    for key, value in sorted(given.items(), key=lambda item: "." not in item[0]):
        named, dot, plain = key.rpartition(".")
        takers = [name for name, m in methods.items() if plain in m.settings and (not dot or name == named)]
        if not dot and key in keys:
            for_stage[key] = value
        elif takers:
            for name in takers:
                for_method[name].setdefault(plain, value)
        else:
            raise _nobody_takes(stage, key, keys, methods)
    return for_stage, for_method


def _nobody_takes(stage: str, key: str, own: frozenset[str], methods: Mapping[str, MethodSpec]) -> UsageError:
    named, dot, plain = key.rpartition(".")
    known = own.union(*(m.settings for m in methods.values()))
    if dot and named not in methods:
        hint: str | None = f"{named} is not among the chosen methods: {', '.join(methods)}"
    else:
        every = [(folder, name) for folder, _ in kinds(stage) for name in names(folder)]
        able = [name for folder, name in every if plain in load(folder, name, MethodSpec).settings]
        able += [stage] if plain in own else []
        hint = f"{plain} is a setting of {', '.join(able)}" if able else None
    return UsageError(f"unknown setting '{key}': {did_you_mean(plain, known)}", hint)


def parse_config(config: type[BaseModel], settings: Mapping[str, str]) -> Any:
    """Make a pydantic settings object from ``--set`` strings.

    Raises:
        UsageError: An unknown key or a value that the settings refuse.
    """
    from pydantic import ValidationError

    for key in settings:
        if key not in config.model_fields:
            raise UsageError(f"unknown setting '{key}': {did_you_mean(key, config.model_fields)}")
    try:
        return config.model_validate_strings(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        # A rule over several settings names none of them.
        given = [str(first["loc"][0])] if first["loc"] else list(settings)
        shown = " ".join(f"--set {key}={settings.get(key)}" for key in given)
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{shown}: {message[:1].lower()}{message[1:]}") from error
