"""docs/cli.md and the completion scripts, made from the commands themselves."""

from __future__ import annotations

from typing import Any

from typer.completion import get_completion_script

from kdcli.cli import options
from kdcli.cli.app import make
from kdcli.cli.command import COMMANDS, build, flag_of, variable_of

SHELLS = {"bash": "kdcli.bash", "zsh": "_kdcli", "fish": "kdcli.fish", "powershell": "kdcli.ps1"}
"""Shell -> file name that it, or its package manager, expects."""

_INTRO = """# Command line

`kdcli COMMAND --help` says the same. Every option can also be set by its variable, or by its name without
the dashes in `kdcli.toml` or in `[tool.kdcli]` of `pyproject.toml`: options of all stages at the top level,
those of one command in a table of its name. A flag wins over the variable, the variable over the file.

stdout carries the result alone: one path, or with `--json` one JSON document. Everything else goes to stderr.
See [exit codes](exit-codes.md), [tasks](tasks.md) and [methods](methods.md).
"""


def completion(shell: str) -> str:
    """The completion script of a shell; it asks kdcli itself, so it does not age."""
    return get_completion_script(prog_name="kdcli", complete_var="_KDCLI_COMPLETE", shell=shell) + "\n"


def markdown() -> str:
    """Every command with its examples, arguments and options."""
    parts = [_INTRO, _options(make(), "Before the command")]
    shared = [p for p in build("prune").params if flag_of(p) in options.COMMON]
    for name, summary in COMMANDS.items():
        command = build(name)
        parts.append(_command(name, summary, command, name in options.STAGES))
    parts.append("## Options of every stage\n\n" + _table(shared))
    return "\n".join(parts)


def _command(name: str, summary: str, command: Any, common: bool) -> str:
    text = command.help
    examples = [line.strip() for line in text.partition("Example:\n")[2].partition("\n\n")[0].splitlines()]
    more = text.partition(f"{summary}\n\n")[2]
    more, _, verbatim = more.partition("\b\n")
    pieces = " ".join(piece for param in command.params for piece in param.get_usage_pieces(None))
    made = [f"## kdcli {name}\n\n{summary} {more.strip()}\n", _code("sh", examples)]
    if verbatim:
        made.append(_code("yaml", verbatim.splitlines()))
    made.append(f"Usage: `kdcli {name} [OPTIONS] {pieces}`\n".replace(" `\n", "`\n"))
    own = [param for param in command.params if not (common and flag_of(param) in options.COMMON)]
    made.append(_table(own))
    if common:
        lacking = [f"`--{one}`" for one in options.COMMON if one not in map(flag_of, command.params)]
        but = f", except {' and '.join(lacking)}" if lacking else ""
        made.append(f"And the [options of every stage](#options-of-every-stage){but}.\n")
    return "\n".join(made)


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def _options(command: Any, title: str) -> str:
    rows = [f"| `{'`, `'.join(param.opts)}` | {param.help} |" for param in command.params]
    return f"## {title}\n\n" + "\n".join(["| option | |", "|---|---|", *rows, ""])


def _table(params: list[Any]) -> str:
    rows = ["| | | default | variable |", "|---|---|---|---|"]
    for param in params:
        flag = flag_of(param)
        names = (
            ", ".join(f"`{one}`" for one in (*param.opts, *param.secondary_opts))
            if flag
            else f"`{param.metavar}`"
        )
        value = f" `{param.metavar}`" if flag and param.metavar else ""
        help, _, said = (param.help or "").partition(" [default: ")
        default = said.removesuffix("]") if said else _default(param)
        variable = f"`{variable_of(flag)}`" if flag else ""
        rows.append(f"| {names}{value} | {_cell(help)} | {_cell(default)} | {variable} |")
    return "\n".join([*rows, ""])


def _default(param: Any) -> str:
    if param.required:
        return "required"
    return "" if param.default is None or param.default is False else f"`{param.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
