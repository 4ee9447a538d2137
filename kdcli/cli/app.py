"""The entry point: builds the app, and is the only place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.completion import completion_init, install_callback, show_callback
from typer.main import get_command

from kdcli import __version__, interrupts
from kdcli.cli import streams
from kdcli.cli.command import CONTEXT, Group
from kdcli.errors import MEANING, ExitCode, InterruptedRun

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "typer")

EXAMPLE = """\b
Example:
  kdcli distill --teacher minilm --student tiny | kdcli prune - --sparsity 0.3 |
    kdcli quantize - | kdcli evaluate - --max-drop 0.02

Compress a trained model from the shell. Every stage writes one directory (checkpoint, ONNX export,
report) and prints its path, so stages chain with - for the model.
"""
EPILOG = (
    "Every option has a default in a KDCLI_<OPTION> variable, in ./kdcli.toml or in [tool.kdcli] of "
    "./pyproject.toml; a flag wins over the variable, the variable over the file.\n\n\b\nExit codes:\n"
    + "\n".join(f"  {code:>3}  {text}" for code, text in MEANING.items())
)


def versions() -> dict[str, str]:
    """Versions of kdcli and what it stands on, from their metadata: nothing is imported."""
    from importlib import metadata

    found = {"kdcli": __version__, "python": sys.version.split()[0]}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _print_version(wanted: bool) -> None:
    if wanted:
        streams.put(sys.stdout, "\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


# Flags of type bool with a default of their own: for those alone typer does not import pydantic at start-up.
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the versions of what matters.", callback=_print_version, is_eager=True
        ),
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show-completion", help="Show completion for the current shell.", callback=show_callback
        ),
    ] = False,
    install: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            help="Install completion for the current shell.",
            callback=install_callback,
        ),
    ] = False,
) -> None:
    """See EXAMPLE."""


def make() -> Any:
    """Build the top-level command."""
    app = typer.Typer(
        cls=Group,
        name="kdcli",
        add_completion=False,
        help=EXAMPLE,
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=CONTEXT,
    )
    app.callback()(_top)
    return get_command(app)


def _explain(error: BaseException, words: Sequence[str]) -> int:
    from kdcli.cli import failures

    return failures.explain(error, words)


def _run(words: list[str]) -> Any:
    """Run the command; a signal decides the exit code, whatever became of the exception that it raised."""
    error: BaseException | None = None
    code: Any = None
    try:
        code = make().main(args=words, prog_name="kdcli", standalone_mode=False, obj={"words": words})
    except SystemExit as stop:
        gone = isinstance(
            stop.__context__, BrokenPipeError
        )  # typer's 1 for a reader of help that has seen enough
        code = ExitCode.OK if gone else stop.code
    except BaseException as raised:
        error = raised
    with interrupts.held():
        if interrupts.caught() is not None and not isinstance(error, InterruptedRun):
            lost, error = error, interrupts.stopped()
            error.__cause__ = lost
        elif error is None and code == ExitCode.INTERRUPTED:  # typer's answer to Ctrl-C
            error = KeyboardInterrupt()
        return code if error is None else _explain(error, words)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run kdcli and exit.

    Args:
        argv: Words after the program's name; those of the process when None.
    """
    streams.open_missing()
    words = list(sys.argv[1:] if argv is None else argv)
    if "_KDCLI_COMPLETE" in os.environ:
        # Typer's zsh, fish and powershell completions would import rich to take markup out of our help
        # texts, which have none; an import system told that there is no rich takes a fifth of the time.
        sys.modules["rich"] = None  # type: ignore[assignment]
        completion_init()
    with interrupts.installed():
        code = _run(words)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            streams.silence(stream)
    sys.exit(code)
