"""YAML whose mappings and lists know on which line each of their parts stands, for messages."""

from __future__ import annotations

from typing import Any

import yaml

from kdcli.errors import first_line


class LinedError(Exception):
    """The text is not YAML; the message begins with the line where that is known."""


class TwiceError(LinedError):
    """A mapping has a key twice."""


class LinedMapping(dict[Any, Any]):
    """A mapping; ``lines`` has the line of every key, from 1."""

    lines: dict[Any, int]


class LinedList(list[Any]):
    """A list; ``lines`` has the line of every entry, from 1."""

    lines: list[int]


def load(text: str) -> Any:
    """Plain data as ``yaml.safe_load`` gives it, of :class:`LinedMapping` and :class:`LinedList`.

    Raises:
        TwiceError: A mapping has a key twice, of which plain YAML takes the last one.
        LinedError: It is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise LinedError(_at(mark, str(error.problem or first_line(error)))) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise LinedError(first_line(error)) from error


def _at(mark: Any, said: str) -> str:
    return said if mark is None else f"line {mark.line + 1}: {said}"


class _Loader(yaml.SafeLoader):
    """Safe, with lines."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> LinedMapping:
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key, deep=True)
        line = key.start_mark.line + 1
        if isinstance(name, (str, int, float, bool)) and name in lines:
            raise TwiceError(f"line {line}: '{name}' is given twice, first in line {lines[name]}")
        if isinstance(name, (str, int, float, bool)):
            lines[name] = line
    made = LinedMapping(loader.construct_mapping(node, deep=True))
    made.lines = lines
    return made


def _list(loader: _Loader, node: yaml.SequenceNode) -> LinedList:
    made = LinedList(loader.construct_sequence(node, deep=True))
    made.lines = [entry.start_mark.line + 1 for entry in node.value]
    return made


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _list)
