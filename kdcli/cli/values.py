"""Turn what a person typed into a value, and offer what may be typed.

The functions that check raise ValueError, which typer turns into a usage error that names the option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kdcli import request as base
from kdcli.errors import InputError, UsageError, did_you_mean
from kdcli.models.aliases import SMALL_STUDENTS, small_student

Check = Callable[[str], str]

DEVICES = ("auto", "cpu", "cuda", "mps")
RUNTIMES = ("onnx", "torch", "both")
SCHEDULES = ("iterative", "one-shot", "gradual")
LISTS = ("data", "methods", "models", "students")


def real(
    low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """Make a parser of finite numbers in a range; ``above`` and ``below`` exclude the ends."""

    def parse(given: str) -> float:
        try:
            value = float(given)
        except ValueError as error:
            raise ValueError(f"'{given}' is not a number") from error
        inside = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not math.isfinite(value) or not inside:
            upper = f" and {'below' if below else 'at most'} {high:g}" if math.isfinite(high) else ""
            raise ValueError(f"'{given}' must be {'above' if above else 'at least'} {low:g}{upper}")
        return value

    return parse


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make a parser of whole numbers in a range, ends included."""

    def parse(given: str) -> int:
        try:
            value = int(given)
        except ValueError as error:
            raise ValueError(f"'{given}' is not a whole number") from error
        if value < low or (high is not None and value > high):
            raise ValueError(f"'{given}' must be at least {low}" + (f" and at most {high}" if high else ""))
        return value

    return parse


def one_of(what: str, names: Callable[[], Iterable[str]]) -> Check:
    """Make a check that a name exists; ``names`` is asked only when the option is read."""

    def check(given: str) -> str:
        known = tuple(names())
        if given not in known:
            raise ValueError(f"unknown {what} '{given}': {did_you_mean(given, known)}")
        return given

    return check


def structure(given: str) -> str:
    """Check the name of what is pruned: of N:M, whose numbers are free, the form; of a sum, the parts."""
    if "+" in given:
        try:
            return "+".join(base.parts_of(given))
        except UsageError as error:
            raise ValueError(str(error)) from error
    return given if base.n_of_m(given) else one_of("structure", lambda: base.STRUCTURE_NAMES)(given)


def methods(family: str) -> Callable[[], tuple[str, ...]]:
    """Make a function that lists the methods of a family without importing them."""

    def names() -> tuple[str, ...]:
        from kdcli import registry

        return registry.names(family)

    return names


def device(given: str) -> str:
    """Check ``auto|cpu|cuda[:N]|mps``; whether the device is there is for the stage to say."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", given):
        raise ValueError(f"unknown device '{given}': {did_you_mean(given, DEVICES)}, or cuda:N")
    return given


def model(given: str) -> str:
    """Check a model reference as far as that goes without touching the network.

    Raises:
        InputError: A bare word that is neither here nor an alias.
    """
    from kdcli.models.aliases import MODELS

    known = given == "-" or "/" in given or given in MODELS or Path(given).exists()
    if not given or not known:
        raise InputError(
            f"'{given}' is neither a directory nor a known alias: {did_you_mean(given, MODELS)}",
            "a model of the hub is written org/name[@revision]",
        )
    return given


def student(given: str) -> str:
    """Check a student: a preset, ``LxH``, one that is no transformer, or a model reference."""
    if given in base.STUDENT_PRESETS or re.fullmatch(r"\d+x\d+", given) or small_student(given):
        return given
    if "/" not in given and given not in model_aliases() and not Path(given).exists():
        hint = did_you_mean(given, students())
        raise ValueError(f"unknown student '{given}': {hint}, or LxH such as 3x192, or a model directory")
    return given


def rank(given: str) -> str:
    """Check a rank: a whole number from 1 on, or ``evbmf``."""
    if given != "evbmf":
        try:
            int(given)
        except ValueError as error:
            raise ValueError(f"'{given}' is neither a whole number nor evbmf") from error
        whole(1)(given)
    return given


def layer_map(given: str) -> str:
    """Check a layer map: a name, or pairs such as ``1:2,2:4``."""
    from kdcli.training import layer_map as maps

    maps.parse(given)
    return given


def layer_maps() -> tuple[str, ...]:
    """Names of layer maps."""
    from kdcli.training import layer_map as maps

    return maps.NAMES


def size(given: str | int) -> int:
    """Parse ``20MiB`` to bytes."""
    from kdcli.report.gates import parse_size

    return parse_size(given) if isinstance(given, str) else given


def gate(given: str) -> str:
    """Check ``accuracy>=0.9``."""
    from kdcli.report.gates import parse_expression

    parse_expression(given)
    return given


def pair(given: str) -> str:
    """Check ``KEY=VALUE``."""
    key, sign, _ = given.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"'{given}' must be written KEY=VALUE")
    return given


def weight(given: str) -> str:
    """Check ``NAME=VALUE`` with a value of 0 or more."""
    real(0)(pair(given).partition("=")[2])
    return given


def batch_sizes(given: str) -> str:
    """Check ``1,32``."""
    for part in given.split(","):
        whole(1)(part.strip())
    return given


def explained(parse: Callable[..., object]) -> Callable[..., object]:
    """Let typer report a library's usage error as the option's own."""

    def parser(given: str) -> object:
        try:
            return parse(given)
        except UsageError as error:
            raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from error

    return parser


def pairs(given: Iterable[str] | None) -> dict[str, str]:
    """Take checked ``KEY=VALUE`` texts apart; the last one of a key counts."""
    split = (one.partition("=") for one in given or ())
    return {key.strip(): value.strip() for key, _, value in split}


def offer(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Make a completion of the names that start with what is typed so far."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def model_aliases() -> tuple[str, ...]:
    """Names of models that need no path."""
    from kdcli.models.aliases import MODELS

    return tuple(MODELS)


def students() -> tuple[str, ...]:
    """Names of students."""
    return (*base.STUDENT_PRESETS, *SMALL_STUDENTS)


def data_aliases() -> tuple[str, ...]:
    """Names of data sets; the alias table itself would cost the import of numpy on every TAB."""
    return (base.DEFAULT_DATA,)
