"""``kdcli predict``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kdcli import atomic
from kdcli.cli import options as o
from kdcli.cli import stage, streams
from kdcli.data import lines
from kdcli.errors import InputError, ResourceError, UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.data.lines import LineBlock
    from kdcli.data.tables import Located

EXAMPLES = """
kdcli predict out/int8 reviews.csv
echo "a fine film" | kdcli predict out/int8
"""

RUNTIMES = ("onnx", "torch")

FileArg = Annotated[
    str | None,
    typer.Argument(metavar="FILE", help="Texts: .txt or any form of data; - or nothing: lines of stdin."),
]
OutputOpt = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the answers there.")
]
TopOpt = Annotated[
    str | None, typer.Option("--top", metavar="N", help="Also the scores of the N best labels, best first.")
]
BatchOpt = Annotated[str, typer.Option("--batch-size", metavar="N", help="Rows that the model gets at once.")]
RuntimeOpt = Annotated[
    str,
    typer.Option(
        "--runtime", help="What runs the model: onnx or torch.", autocompletion=o.offer(list(RUNTIMES))
    ),
]


def command(
    model: o.ModelArg,
    file: FileArg = None,
    output: OutputOpt = None,
    top: TopOpt = None,
    batch_size: BatchOpt = "32",
    columns: o.ColumnsOpt = None,
    runtime: RuntimeOpt = "onnx",
    device: o.DeviceOpt = "auto",
    offline: o.OfflineOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
    debug: o.DebugOpt = False,
) -> None:
    """One JSON object a row, in order. Labels in the data are not looked at.

    A line of stdin is a text, or where the first one begins with { a JSON object with text, or text_a and text_b.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"--runtime: unknown runtime '{runtime}': {did_you_mean(runtime, RUNTIMES)}")
    how: dict[str, Any] = {"batch_size": _count("--batch-size", batch_size), "torch": runtime == "torch"}
    how |= {"top": None if top is None else _count("--top", top), "device": device}
    arriving = None
    if file in (None, "-"):
        arriving = _stdin(model, file)
    elif output is not None and output.exists() and os.path.samefile(output, str(file)):
        raise UsageError(f"--output '{output}' is the file that is read")
    ref = streams.reference(model)
    with stage.session("kdcli predict", quiet=quiet, verbose=verbose) as (console, stdout):
        from kdcli.models import references

        found = references.resolve_graph(ref) or references.resolve(ref, offline=offline, progress=console)
        if arriving is None and not Path(str(file)).is_file():
            raise InputError(f"there is no file '{file}'", "texts also come from stdin: - for FILE")
        first = None if arriving is None else next(arriving, None)
        if arriving is not None and first is None:
            with _place(output, stdout):
                return  # nothing to answer, and nothing heavy was loaded
        from kdcli.data import streamed
        from kdcli.data.columns import parse_columns
        from kdcli.run import predicting

        chosen = parse_columns(columns)

        def read(kind: Any) -> Iterator[Located]:
            if arriving is None:
                return streamed.of_file(Path(str(file)), chosen, kind)
            assert first is not None
            return streamed.of_lines(chain([first], arriving), "stdin", chosen, kind)

        rows = 0
        with stage.cached(console), _place(output, stdout) as place:
            for part in predicting.answers(found, read, predicting.PredictOptions(**how), console):
                rows += len(part)
                if not streams.put(place, "\n".join(map(_line, part))):
                    return
        if output is not None:
            streams.put(stdout, str(output))
        console.line(f"{console.prefix}: {rows:,} rows in {console.elapsed()}")


_line = partial(json.dumps, ensure_ascii=False, allow_nan=False)


def _count(flag: str, given: str) -> int:
    if not given.isascii() or not given.isdigit() or not int(given):
        raise UsageError(f"{flag}: '{given}' is not a whole number of at least 1")
    return int(given)


def _stdin(model: str, file: str | None) -> Iterator[LineBlock]:
    """The lines of stdin as they arrive."""
    if model == "-":
        raise UsageError(
            "'-' reads the model from stdin, so the texts must come from a file",
            "kdcli quantize ... | kdcli predict - FILE",
        )
    if file is None and sys.stdin.isatty():
        raise UsageError(
            "no texts: neither a FILE nor anything on stdin",
            "give a file, pipe texts into it (one a line), or type them after kdcli predict MODEL -",
        )
    return lines.parts(sys.stdin.buffer, "stdin")  # type: ignore[arg-type]


@contextlib.contextmanager
def _place(output: Path | None, stdout: TextIO) -> Iterator[TextIO]:
    """Where the answers go: a file takes its name once it is whole.

    Raises:
        ResourceError: It cannot be written.
    """
    if output is None:
        yield stdout
        return
    try:
        with atomic.replacing(output) as partly, partly.open("w", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        if error.filename is None:
            raise
        raise ResourceError(f"'{output}' cannot be written: {error.strerror or error}") from error
