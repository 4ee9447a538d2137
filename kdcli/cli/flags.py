"""The options of the stages as plain data, made from their models: ``flags.json`` beside this file.

Help and completion must not wait for pydantic, so they read the file; ``tools/gen.py`` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from kdcli.options import Declared, Flag, Options, declared
from kdcli.request import Common, Gates, OneModel
from kdcli.stages.options import OPTIONS


class Terminal(Options):
    """How a command speaks; nothing of it reaches a stage."""

    dry_run: Annotated[bool, Flag(short="n", off=True)] = Field(
        default=False, description="Print the plan and estimates, change nothing."
    )
    as_json: Annotated[bool, Flag(name="json", off=True)] = Field(
        default=False, description="JSON on stdout instead of text."
    )
    quiet: Annotated[bool, Flag(short="q", off=True)] = Field(
        default=False, description="Only errors on stderr."
    )
    verbose: Annotated[bool, Flag(short="v", off=True)] = Field(default=False, description="More on stderr.")
    debug: Annotated[bool, Flag(off=True)] = Field(default=False, description="Show tracebacks of errors.")


def text() -> str:
    """The content of ``flags.json``: the options that stages share, and those of each."""
    shared = {part.__name__.lower(): _part(part) for part in (Gates, Common, Terminal)}
    stages = {
        stage: {"model": _part(OneModel) if own.takes_model else [], "own": _part(own)}
        | ({"without": sorted(own.without)} if own.without else {})
        for stage, own in OPTIONS.items()
    }
    return json.dumps({"shared": shared, "stages": stages}, indent=1, ensure_ascii=False) + "\n"


def _part(options: type[Options]) -> list[dict[str, Any]]:
    return [_entry(one) for one in declared(options).values()]


def _entry(one: Declared) -> dict[str, Any]:
    """What typer has to know; what is false or absent is left out."""
    default = one.info.get_default(call_default_factory=True, validated_data={})
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    plain = one.kind == "one" and default is not None and not one.info.is_required()
    found = {
        "field": one.field,
        "name": one.name,
        "kind": one.kind,
        "help": one.help,
        "short": one.flag.short,
        "metavar": one.flag.metavar,
        "argument": one.flag.argument,
        "required": one.info.is_required() or one.flag.argument,
        "off": one.flag.off,
        "path": one.kind == "one" and Path in get_args(one.info.annotation),
        "default": str(shown) if plain else None,
        "names": list(one.flag.names()) if one.flag.names is not None else None,
    }
    return {key: value for key, value in found.items() if value not in (None, False)}
