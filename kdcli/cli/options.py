"""The options of the stages as typer has them, from ``flags.json`` (see ``flags.py``)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_TABLE = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))

SHARED: dict[str, dict[str, Any]] = {
    entry["field"]: entry for part in _TABLE["shared"].values() for entry in part
}
"""Options of every stage, by field."""

STAGES: tuple[str, ...] = tuple(_TABLE["stages"])

COMMON: tuple[str, ...] = tuple(entry["name"] for entry in SHARED.values())
"""Their flags; the keys that kdcli.toml may have outside a command's table."""


def entries(stage: str) -> list[dict[str, Any]]:
    """Every option of a stage, in the order of its help."""
    found = _TABLE["stages"][stage]
    without = found.get("without", ())
    shared = [entry for entry in SHARED.values() if entry["field"] not in without]
    return [*found["model"], *found["own"], *shared]


def function(stage: str, run: Callable[[typer.Context], None]) -> Callable[..., None]:
    """Make the function from which typer makes the command of a stage: one parameter an option.

    Args:
        stage: The stage.
        run: Called with typer's context, which has the values.
    """

    def command(ctx: typer.Context, **values: Any) -> None:
        run(ctx)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *(_parameter(entry) for entry in entries(stage))]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _parameter(entry: dict[str, Any]) -> inspect.Parameter:
    kind, required = entry["kind"], entry.get("required", False)
    one = Path if entry.get("path") else str
    plain: Any = {"flag": bool, "many": list[str], "one": one}[kind]
    default = inspect.Parameter.empty if required else False if kind == "flag" else entry.get("default")
    if default is None:
        plain = plain | None
    return inspect.Parameter(
        entry["field"],
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[plain, _info(entry)],
        default=default,
    )


def _info(entry: dict[str, Any]) -> Any:
    more = {
        "help": entry["help"],
        "metavar": entry.get("metavar"),
        "autocompletion": offer(entry["names"]) if "names" in entry else None,
        "show_envvar": False,
    }
    if entry.get("argument"):
        return typer.Argument(**more)
    flags = [f"-{entry['short']}"] if "short" in entry else []
    if entry.get("off"):
        more["show_default"] = False  # "no-force" says nothing
        return typer.Option(*flags, f"--{entry['name']}/--no-{entry['name']}", **more)
    return typer.Option(*flags, f"--{entry['name']}", **more)


def offer(names: list[str]) -> Callable[[str], list[str]]:
    """Make a completion of the names that start with what is typed so far."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


# --- for the commands that are not stages ---------------------------------------------------------

_PRUNE = {entry["field"]: entry for entry in entries("prune")}
_EVALUATE = {entry["field"]: entry for entry in entries("evaluate")}

ModelArg = Annotated[str, _info(_PRUNE["model"])]
HtmlOpt = Annotated[Path | None, _info(_EVALUATE["html"])]
OutOpt = Annotated[Path | None, _info(SHARED["out"])]
ForceOpt = Annotated[bool, _info(SHARED["force"])]
ColumnsOpt = Annotated[str | None, _info(SHARED["columns"])]
DeviceOpt = Annotated[str, _info(SHARED["device"])]
OfflineOpt = Annotated[bool, _info(SHARED["offline"])]
DryRunOpt = Annotated[bool, _info(SHARED["dry_run"])]
JsonOpt = Annotated[bool, _info(SHARED["as_json"])]
QuietOpt = Annotated[bool, _info(SHARED["quiet"])]
VerboseOpt = Annotated[bool, _info(SHARED["verbose"])]
DebugOpt = Annotated[bool, _info(SHARED["debug"])]
