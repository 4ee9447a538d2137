"""How kdcli's commands differ from typer's own: built when needed, defaults from file and environment."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from typer.core import CompletionItem, TyperCommand, TyperGroup
from typer.main import get_command

from kdcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.cli import settings
    from kdcli.request import StageName

COMMANDS = {
    "distill": "Train a small student to answer as a teacher does.",
    "prune": "Remove heads, neurons, layers, features, tokens or weights.",
    "lowrank": "Replace weight matrices by products of two thin ones.",
    "quantize": "Store weights as small integers and compute with them.",
    "evaluate": "Measure models on the same rows, compare them, judge gates.",
    "predict": "Answer texts with a model, one JSON object per row.",
    "inspect": "Show what is in a model directory.",
    "list": "Show the names that options take.",
    "run": "Run the stages of a recipe.",
    "report": "Show the report of an output directory.",
    "doctor": "Describe this machine as kdcli sees it.",
}
"""Name -> summary. The module of that name in this package has its EXAMPLES; it is imported when the command is asked
for. That of a stage says more in its docstring, and its options are those of the stage; any other holds the function
``command``, whose docstring and parameters they are."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_ORIGINS = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file"}


def flag_of(param: Any) -> str | None:
    """The long flag of an option without its dashes; None for an argument."""
    longest = max(param.opts, key=len)
    return longest[2:] if longest.startswith("--") else None


def variable_of(flag: str) -> str:
    """The environment variable that gives an option its default."""
    return "KDCLI_" + flag.upper().replace("-", "_")


JUDGING = (
    *("max-drop", "min-speedup", "max-size", "gate"),
    *("baseline", "data", "columns", "split", "limit"),
)
"""What decides whether a model passes: here an empty variable is a mistake of whoever set it, and not a default."""


def kind_of(param: Any) -> settings.FlagKind:
    """How many values an option takes: a flag none, a repeatable one many."""
    return "flag" if param.is_flag else "many" if param.multiple else "one"


def _squashed(variable: str) -> str:
    """A name without what is easily written in another way: case, underscores, the plural."""
    return variable.upper().replace("_", "").removesuffix("S")


def _refuse_lost(ctx: Any, flags: dict[str, Any]) -> None:
    """Refuse an empty or misspelt variable that would silently drop a gate, or judge something else.

    Raises:
        UsageError: There is one, and no flag on the command line in its place.
    """
    alike = {_squashed(variable_of(flag)): flag for flag in JUDGING}
    for name in os.environ:
        flag = alike.get(_squashed(name), "")
        if flag in flags and name != variable_of(flag) and origin(ctx, flags[flag]) == "default":
            raise UsageError(
                f"kdcli does not read {name}: did you mean {variable_of(flag)}?", "rename it, or unset it"
            )
    for flag in JUDGING:
        given = os.environ.get(variable_of(flag))
        if flag in flags and given is not None and not given.strip() and origin(ctx, flags[flag]) != "flag":
            raise UsageError(
                f"{variable_of(flag)} is set, but empty", f"give it a value as for --{flag}, or unset it"
            )


def origin(ctx: Any, name: str) -> str:
    """Where the value of a parameter came from: flag, environment, file or default."""
    source = ctx.get_parameter_source(name)
    return "default" if source is None else _ORIGINS.get(source.name, "default")


def _as_given(ctx: Any, value: Any) -> Any:
    return value


class Command(TyperCommand):
    """A command whose options also come from KDCLI_<FLAG> variables and kdcli.toml."""

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        for param in self.params:
            if (flag := flag_of(param)) is not None:
                param.envvar = variable_of(flag)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; the settings file only when they will be used."""
        if ctx.resilient_parsing:
            # Completion: typer converts every value through pydantic, given or not. On each TAB that would
            # cost more than everything else together, and what is typed so far need not be valid.
            for param in self.get_params(ctx):
                vars(param)["process_value"] = _as_given
        elif not {"-h", "--help"} & set(args):
            from kdcli.cli import options, settings

            flags = {flag: param for param in self.params if (flag := flag_of(param)) is not None}
            kinds = {flag: kind_of(param) for flag, param in flags.items()}
            found = settings.read(Path()).of(str(self.name), kinds, common=options.COMMON, commands=COMMANDS)
            ctx.default_map = {flags[key].name: value for key, value in found.items()}
            rest = super().parse_args(ctx, args)
            _refuse_lost(ctx, {flag: param.name for flag, param in flags.items()})
            return rest
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """The top level: a command is built when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of a pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build one command; None when there is none of that name."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.add_command(build(cmd_name), cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands without building them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command, or the options of the top level."""
        names = [
            CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)
        ]
        return names or TyperCommand.shell_complete(self, ctx, incomplete)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words before the command."""
        for param in self.get_params(ctx):
            # All are flags. For one that is absent typer imports pydantic to convert None, but not False.
            param.default = False
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the words begin with."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"no command '{args[0]}': {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


def build(name: str) -> Any:
    """Make a command from its module."""
    from kdcli.cli import options

    module = importlib.import_module(f"kdcli.cli.{name}")
    examples = "".join(f"  {line}\n" for line in module.EXAMPLES.strip().splitlines())
    # \b keeps the lines of the paragraph as they are.
    command = options.function(name, _stage(name)) if name in options.STAGES else module.command
    more = inspect.getdoc(module if name in options.STAGES else command)
    text = f"\b\nExample:\n{examples}\n{COMMANDS[name]}\n\n{more}"
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=Command, help=text, short_help=COMMANDS[name], context_settings=CONTEXT)(command)
    return get_command(app)


def _stage(name: str) -> Callable[[typer.Context], None]:
    def run(ctx: typer.Context) -> None:
        from kdcli.cli import stage

        stage.execute(ctx, cast("StageName", name))

    return run
