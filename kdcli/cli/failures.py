"""What an exception means to a person, and to the shell."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from kdcli.cli.command import COMMANDS, flag_of, variable_of
from kdcli.cli.console import Console, clean, make
from kdcli.errors import ExitCode, InputError, InterruptedRun, KdcliError, ParityError, did_you_mean
from kdcli.report.redact import redact


def explain(error: BaseException, words: Sequence[str]) -> int:
    """Say on stderr what happened and what to do, and return the exit code."""
    name = next((word for word in words if word in COMMANDS), None)
    console = make("kdcli" if name is None else f"kdcli {name}")
    if "--debug" in words or os.environ.get("KDCLI_DEBUG", "").lower() in ("1", "true", "yes", "on"):
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if (exhausted := _exhausted(error)) is not None:
        console.error(*exhausted)
        return int(ExitCode.RESOURCE)
    if isinstance(error, (KdcliError, InterruptedRun)):
        console.error(clean(str(error)), None if error.hint is None else clean(error.hint))
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        console.error("interrupted")
        return int(ExitCode.INTERRUPTED)
    if hasattr(error, "format_message"):  # typer's own: bad words on the command line
        return _usage(error, console, name)
    if (reason := _resource(error)) is not None or (reason := _forbidden(error)) is not None:
        console.error(*reason)
        return int(ExitCode.RESOURCE)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    console.error(
        f"this is a bug in kdcli ({clean(what.splitlines()[0])})",
        "run it again with --debug to get the traceback",
    )
    return int(ExitCode.BUG)


def _usage(error: Any, console: Console, name: str | None) -> int:
    """A typer error in our words; a bad value of the settings file is bad input, not bad usage."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(ExitCode.USAGE)
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    help_hint = f"kdcli {name} --help shows the options" if name else "kdcli --help shows the commands"
    possible = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and ctx is not None:
        flags = [
            flag
            for one in ctx.command.params
            for flag in (*one.opts, *one.secondary_opts)
            if flag.startswith("--")
        ]
        close = did_you_mean(str(possible), flags).partition("? choose")
        console.error(f"no option {possible}" + (f": {close[0]}?" if close[1] else ""), help_hint)
        return int(ExitCode.USAGE)
    if param is None or type(error).__name__ == "MissingParameter":
        console.error(clean(error.format_message().rstrip(".").replace("\n\t", " ")), help_hint)
        return int(ExitCode.USAGE)
    message = error.message.removeprefix("Value error, ")
    source = ctx.get_parameter_source(param.name) if ctx is not None else None
    origin = "" if source is None else source.name
    flag = flag_of(param)
    where = param.name.upper() if flag is None else f"--{flag}"
    if origin == "DEFAULT_MAP":
        console.error(clean(f"settings file: {flag}: {message}"))
        return int(ExitCode.INPUT)
    if origin == "ENVIRONMENT" and flag is not None:
        where = variable_of(flag)
    console.error(clean(f"{where}: {message}"), help_hint)
    return int(ExitCode.USAGE)


def _exhausted(error: BaseException) -> tuple[str, str] | None:
    """Message and hint when a model was called unfit, but what lies behind it is a full disk or memory."""
    if not isinstance(error, InputError | ParityError):
        return None
    cause = error.__cause__
    for _ in range(20):
        if cause is None or (reason := _resource(cause)) is not None:
            break
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else reason


def _forbidden(error: BaseException) -> tuple[str, str] | None:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        hint = "kdcli doctor shows the places that are used, and the variables that name them"
        return f"a file cannot be written or read ({clean(str(error))})", hint
    return None


def _resource(error: BaseException) -> tuple[str, str] | None:
    """Message and hint when memory or disk ran out; libraries have many words for that."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk ({clean(text)})", "free some, or write elsewhere with -o"
    if text.startswith("[Errno 2] No usable temporary directory"):
        return "no temporary directory can be written", "set TMPDIR to one that can"
    if "No space left on device" in text:
        return "no space left on the disk", "free some, or write elsewhere with -o"
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or "DefaultCPUAllocator: can't allocate memory" in text or "bad allocation" in text:
        return "out of memory", "a smaller --batch-size or --limit needs less"
    return None
