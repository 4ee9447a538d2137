"""What an option is: one field of a pydantic model, and every way in checks it there.

The field's type and bounds say what is allowed, its description is the help text, and a :class:`Flag` beside the type
says how it is spelt. A flag, a ``KDCLI_`` variable, a key of kdcli.toml or of a recipe, an argument in Python and the
configuration in a report are all made from that one field.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from kdcli.errors import UsageError, did_you_mean

_LONGEST = 60
_TYPES = {
    "int_parsing": "is not a whole number",
    "int_parsing_size": "is not a whole number",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "string_type": "is not text",
    "path_type": "is not a path",
    "tuple_type": "is not a list",
    "mapping_type": "is not a mapping of names to values",
}
"""Type of a pydantic error -> what is said of the value."""

Spell = Callable[[str], str]
"""Writes the name of a field as the way in has it: ``--max-drop``, ``max-drop``, ``max_drop``."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How a field is spelt, and what is done to a value before and after its type is checked."""

    metavar: str | None = None
    name: str | None = None  # the long flag without dashes; None: the field's name
    short: str | None = None  # one letter
    argument: bool = False  # stands by itself, without a flag
    off: bool = False  # --no-NAME too
    recipe: bool = True  # a recipe has it
    names: Callable[[], Iterable[str]] | None = None  # what completion offers
    parse: Callable[[Any], Any] | None = None  # of the whole value, before its type is checked
    check: Callable[[Any], Any] | None = None  # of one value, afterwards; raises ValueError or UsageError


_PLAIN = Flag()


class OptionError(UsageError):
    """An option that is unknown, missing or out of range, or two that contradict each other.

    Args:
        field: The field's name; None where several fields are named in the text.
        text: What is wrong; fields that it names stand in braces.
    """

    def __init__(self, field: str | None, text: str) -> None:
        self.field, self.text = field, text
        super().__init__(self.said(lambda name: name))

    def said(self, spell: Spell) -> str:
        """The message in the words of the way in."""
        if self.field is not None:
            return f"{spell(self.field)}: {self.text}"
        return self.text.format_map(_Spelt(spell))


class _Spelt(dict[str, str]):
    def __init__(self, spell: Spell) -> None:
        self.spell = spell

    def __missing__(self, name: str) -> str:
        return self.spell(name)


class Options(BaseModel):
    """Options that belong together; a value that breaks a rule never becomes one.

    Raises:
        OptionError: An unknown field, a missing one, a value out of range, or a combination that means nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    #: Fields of which one at most is given.
    exclusive: ClassVar[tuple[str, ...]] = ()
    #: Field -> the field without which it has no effect.
    needs: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(type(self), error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_typed(cls, value: Any, info: ValidationInfo) -> Any:
        declared = _of_field(cls, info)
        if isinstance(value, bool) and declared.kind != "flag":
            raise ValueError(f"{str(value).lower()} is not a value of this option")
        if declared.kind == "many" and isinstance(value, str | os.PathLike | int | float):
            value = (value,)
        if declared.flag.parse is not None and value is not None:
            return _checked(declared.flag.parse, value)
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if declared.kind == "many" and isinstance(value, list | tuple):
            return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _as_allowed(cls, value: Any, info: ValidationInfo) -> Any:
        check = _of_field(cls, info).flag.check
        if check is None or value is None:
            return value
        if isinstance(value, tuple):
            return tuple(_checked(check, one) for one in value)
        return _checked(check, value)

    @model_validator(mode="after")
    def _together(self) -> Options:
        given = [name for name in self.exclusive if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            named = " and ".join(f"{{{name}}}" for name in given)
            raise _conflict(f"{named} exclude each other; give one of them")
        for name, other in self.needs.items():
            if getattr(self, name) is not None and not getattr(self, other):
                raise _conflict(
                    f"{{{name}}} has no effect without {{{other}}}; give both, or leave {{{name}}} out"
                )
        return self


@dataclass(frozen=True)
class Declared:
    """One field as every way in sees it."""

    field: str
    info: FieldInfo
    flag: Flag

    @property
    def name(self) -> str:
        """The long flag without dashes, and the key in kdcli.toml and recipes."""
        return self.flag.name or self.field.replace("_", "-")

    @property
    def argument(self) -> str:
        """The argument in Python."""
        return self.name.replace("-", "_")

    @property
    def kind(self) -> str:
        """``flag`` takes no value, ``one`` one, ``many`` several."""
        kind = self.info.annotation
        if kind is bool:
            return "flag"
        return "many" if get_origin(kind) is Mapping or kind == tuple[str, ...] else "one"

    @property
    def help(self) -> str:
        """The help text."""
        return self.info.description or ""


def declared(options: type[Options]) -> dict[str, Declared]:
    """The fields of a model by name: its own first, then those of the models that it is made from."""
    owners = [kind for kind in options.__mro__ if issubclass(kind, Options)]

    def distance(name: str) -> int:
        return max(number for number, kind in enumerate(owners) if name in kind.model_fields)

    found = {name: options.model_fields[name] for name in sorted(options.model_fields, key=distance)}
    return {
        name: Declared(name, info, _flag_of(info))
        for name, info in found.items()
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, Options))
    }


def one_of(what: str, names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """Make a check that a name exists; ``names`` is asked only when a value is checked."""

    def check(given: str) -> str:
        known = tuple(names())
        if given not in known:
            raise ValueError(f"unknown {what} '{given}': {did_you_mean(given, known)}")
        return given

    return check


def choice(what: str, names: Callable[[], Iterable[str]]) -> Flag:
    """The flag of an option that takes one of some names."""
    return Flag(metavar="NAME", names=names, check=one_of(what, names))


def pairs(given: Any) -> Any:
    """Take ``KEY=VALUE`` texts apart, the last one of a key counts; a mapping stays one."""
    if isinstance(given, Mapping):
        return {str(key): value for key, value in given.items()}
    made = {}
    for one in given:
        key, sign, value = str(one).partition("=")
        if not sign or not key.strip():
            raise ValueError(f"'{one}' must be written KEY=VALUE")
        made[key.strip()] = value.strip()
    return made


def _flag_of(info: FieldInfo) -> Flag:
    return next((one for one in info.metadata if isinstance(one, Flag)), _PLAIN)


def _of_field(options: type[Options], info: ValidationInfo) -> Declared:
    assert info.field_name is not None
    found = options.model_fields[info.field_name]
    return Declared(info.field_name, found, _flag_of(found))


def _checked(function: Callable[[Any], Any], value: Any) -> Any:
    """Call what a :class:`Flag` names; what it refuses is the option's own error."""
    try:
        return function(value)
    except UsageError as error:
        raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from error


def _conflict(text: str) -> PydanticCustomError:
    return PydanticCustomError("conflict", "{text}", {"text": text})


def _explained(options: type[Options], error: ValidationError) -> OptionError:
    """The first mistake that pydantic found, in words."""
    first = error.errors()[0]
    if first["type"] == "conflict":
        return OptionError(None, first["ctx"]["text"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return OptionError(None, f"unknown option '{name}': {did_you_mean(name, options.model_fields)}")
    if first["type"] == "missing":
        return OptionError(None, f"{{{name}}} is missing")
    return OptionError(name, _said(first, options.model_fields[name]))


def _said(error: ErrorDetails, info: FieldInfo) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    given = error["input"]
    text = "nothing" if given is None else str(given)
    shown = f"'{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}'"
    if (said := _TYPES.get(error["type"])) is not None:
        return f"{shown} {said}"
    bounds = {"ge": None, "gt": None, "le": None, "lt": None} | dict(error.get("ctx", {}))
    for one in info.metadata:
        bounds |= {sign: value for sign in bounds if (value := getattr(one, sign, None)) is not None}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{word} {_number(bounds[sign])}" for sign, word in words.items() if bounds.get(sign) is not None
    ]
    if limits:
        return f"{shown} must be {' and '.join(limits)}"
    return f"{shown}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
