"""Defaults from ``./kdcli.toml``, or from ``[tool.kdcli]`` in ``./pyproject.toml``.

data = "reviews/"          # keys of every stage at the top level
[distill]                  # a table for each command
teacher = "minilm"
set = { temperature = 4 }
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdcli.errors import InputError, did_you_mean

FILE = "kdcli.toml"

FlagKind = Literal["flag", "one", "many"]
"""How many values an option takes: a flag none, a repeatable one many."""


@dataclass(frozen=True)
class ProjectSettings:
    """What the project's file says."""

    source: str = ""  # for messages
    content: Mapping[str, Any] = field(default_factory=dict)

    def of(
        self,
        command: str,
        flags: Mapping[str, FlagKind],
        *,
        common: Collection[str],
        commands: Collection[str],
    ) -> dict[str, str | bool | list[str]]:
        """Values for one command as they would be typed, by flag without dashes.

        Args:
            command: The command's name.
            flags: Every flag that it has, with the number of values that it takes.
            common: Flags that may stand at the top level.
            commands: Names that tables may have.

        Raises:
            InputError: An unknown key or table, or a value that no option could have.
        """
        top = {k: v for k, v in self.content.items() if not (k in commands and isinstance(v, Mapping))}
        table = self.content.get(command, {})
        found = self._checked(top, [*common, *commands], flags, "") if top else {}
        found = {key: value for key, value in found.items() if key in flags}
        if isinstance(table, Mapping):
            found |= self._checked(table, flags, flags, f"[{command}] ")
        return found

    def _checked(
        self, table: Mapping[str, Any], known: Collection[str], kinds: Mapping[str, FlagKind], where: str
    ) -> dict[str, Any]:
        made = {}
        for given, value in table.items():
            key = given.replace("_", "-")
            if key not in known:
                raise InputError(f"{self.source}: {where}unknown key '{given}': {did_you_mean(key, known)}")
            made[key] = _typed(value, kinds.get(key), f"{self.source}: {where}{given}")
        return made


def read(directory: Path) -> ProjectSettings:
    """Read the settings of a directory; empty when it has none.

    Raises:
        InputError: The file is not valid TOML or not readable.
    """
    own, project = directory / FILE, directory / "pyproject.toml"
    if own.is_file():
        return ProjectSettings(FILE, _toml(own, FILE))
    if project.is_file() and "tool.kdcli" in project.read_text(encoding="utf-8", errors="replace"):
        content = _toml(project, project.name).get("tool", {}).get("kdcli", {})
        return ProjectSettings(f"{project.name} [tool.kdcli]", content)
    return ProjectSettings()


def _toml(path: Path, name: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not valid TOML: {error}") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error


def _typed(value: Any, kind: FlagKind | None, where: str) -> str | bool | list[str]:
    """A TOML value as it would be typed: a table becomes KEY=VALUE texts, and where many are allowed one is a list.

    Raises:
        InputError: The option takes no such value: what would be dropped or read as a number is refused.
    """
    if isinstance(value, Mapping):
        if kind == "one" or where.endswith("gate"):
            raise InputError(f"{where}: a table is not a value of this option")
        return [f"{key}={_text(one, where)}" for key, one in value.items()]
    if isinstance(value, list):
        if kind == "one":
            raise InputError(f"{where}: a list is not a value of this option; give one value")
        return [_text(one, where) for one in value]
    if isinstance(value, bool):
        if kind in ("one", "many"):
            raise InputError(f"{where}: {str(value).lower()} is not a value of this option")
        return value
    text = _text(value, where)
    if kind in ("one", "many") and not text.strip():
        raise InputError(f"{where}: the value is empty", "give one, or leave the line out")
    return [text] if kind == "many" else text


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(f"{where}: {value!r} is not a value of an option")
