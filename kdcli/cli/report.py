"""``kdcli report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as o
from kdcli.cli import streams
from kdcli.errors import ResourceError

EXAMPLES = """
kdcli report out/int8 --html report.html
kdcli report out/int8 >> summary.md
"""

DirectoryArg = Annotated[Path, typer.Argument(metavar="DIR", help="An output directory, or its report.json.")]


def command(
    directory: DirectoryArg, html: o.HtmlOpt = None, as_json: o.JsonOpt = False, debug: o.DebugOpt = False
) -> None:
    """As Markdown on stdout, as one HTML file, or as checked JSON."""
    with streams.guarded() as stdout:
        from kdcli.report import io

        report = io.read(directory)
        if html is not None:
            from kdcli.report import html as pages

            try:
                html.parent.mkdir(parents=True, exist_ok=True)
                html.write_text(pages.page(report), encoding="utf-8")
            except OSError as error:
                raise ResourceError(f"'{html}' cannot be written: {error.strerror or error}") from error
        if as_json:
            streams.put(stdout, io.dumps(report))
        elif html is not None:
            streams.put(stdout, str(html))
        else:
            from kdcli.report import markdown

            streams.put(stdout, markdown.table(report))
