"""Exit codes and the error tree (standard library only).

Library code raises these; only ``kdcli.cli`` turns them into an exit. A message says what was
given, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum, unique


@unique
class ExitCode(IntEnum):
    """What a finished kdcli process tells its caller."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    GATE = 4
    PARITY = 5
    RESOURCE = 6
    NETWORK = 7
    INTERRUPTED = 130
    TERMINATED = 143


MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "done, all gates met",
    ExitCode.BUG: "a bug in kdcli (traceback only with --debug, otherwise one line that says so)",
    ExitCode.USAGE: "usage: bad flag or value, illegal chain of stages, output exists without --force",
    ExitCode.INPUT: "bad or unsafe input: model, data or configuration file; a training that diverged",
    ExitCode.GATE: "a gate was missed (output kept)",
    ExitCode.PARITY: "the ONNX export does not agree with the checkpoint",
    ExitCode.RESOURCE: "device, memory or disk",
    ExitCode.NETWORK: "network, or something that is not on this machine while offline",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C (a resume point is kept, no half-written output directory)",
    ExitCode.TERMINATED: "terminated by SIGTERM or SIGHUP (a resume point is kept, no half-written output directory)",
}


class KdcliError(Exception):
    """Base of every error that a user can act on.

    Args:
        message: One sentence: what was given and what is allowed.
        hint: What to do about it; printed on a line of its own.
    """

    exit_code = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(KdcliError):
    """A bad flag or value, an illegal chain of stages, an output that exists."""

    exit_code = ExitCode.USAGE


class InputError(KdcliError):
    """A model, data set or configuration file that is broken, unsafe or unsupported."""

    exit_code = ExitCode.INPUT


class ParityError(KdcliError):
    """The ONNX export does not give the checkpoint's answers."""

    exit_code = ExitCode.PARITY


class ResourceError(KdcliError):
    """A device that is absent, or not enough memory or disk."""

    exit_code = ExitCode.RESOURCE


class UnavailableError(KdcliError):
    """Something that is not on this machine and cannot be fetched."""

    exit_code = ExitCode.NETWORK


class InterruptedRun(BaseException):
    """A signal told this process to stop (:mod:`kdcli.interrupts`). No ``Exception``: that nobody swallows it.

    Args:
        message: What was stopped.
        hint: How to go on.
        terminated: By SIGTERM or SIGHUP, not by Ctrl-C.
    """

    def __init__(self, message: str, hint: str | None = None, *, terminated: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = ExitCode.TERMINATED if terminated else ExitCode.INTERRUPTED


def first_line(error: BaseException) -> str:
    """What another library says of an error, its class where it says nothing: one printable line, 200 characters."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said)
    return said if len(said) <= 200 else said[:199] + "…"


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return the choices of a message: the likeliest one first, then all, sorted.

    >>> did_you_mean("tayler", ["magnitude", "taylor"])
    "did you mean 'taylor'? choose one of: magnitude, taylor"
    """
    names = sorted(set(allowed))
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    choices = f"choose one of: {', '.join(names)}" if names else "there are none"
    return f"did you mean '{close[0]}'? {choices}" if close else choices
