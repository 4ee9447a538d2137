"""The registry of methods: a file in a stage's folder of methods is a method, its name is the file's."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel

FOLDERS: dict[str, str] = {
    "distill": "training/losses",
    "prune": "stages/prune/criteria",
    "quantize": "stages/quantize/schemes",
    "lowrank": "stages/lowrank/rules",
}
"""Stage -> the folder of its methods, below this file's. Losses lie a floor down: every stage's recovery uses some."""

STAGES = tuple(FOLDERS)


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


def load(stage: str, name: str) -> ModuleType:
    """Import a method; raises as :func:`load_name` does."""
    load_name(stage, name)
    return importlib.import_module(f"kdcli.{FOLDERS[stage].replace('/', '.')}.{name.replace('-', '_')}")


def summary(stage: str, name: str) -> str:
    """First line of a method's docstring, read without importing it."""
    return first_line_of(Path(__file__).parent / FOLDERS[stage] / f"{name.replace('-', '_')}.py")


def first_line_of(path: Path) -> str:
    """First line of a file's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].strip()


def parse_settings(module: ModuleType, settings: Mapping[str, str]) -> Any:
    """Make a method's ``Config`` from ``--set`` strings.

    Raises:
        UsageError: An unknown key or a value that the Config refuses.
    """
    return parse_config(module.Config, settings)


def parse_config(config: type[BaseModel], settings: Mapping[str, str]) -> Any:
    """Make any pydantic settings object from strings; see :func:`parse_settings`."""
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
