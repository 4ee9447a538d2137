"""``kdcli list``."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any

import typer

from kdcli.cli import options as o
from kdcli.cli import streams
from kdcli.cli.table import aligned
from kdcli.errors import UsageError, did_you_mean

LISTS = ("data", "methods", "models", "students")

EXAMPLES = """
kdcli list models
kdcli list methods --json
"""

WhatArg = Annotated[
    str,
    typer.Argument(
        metavar="WHAT",
        help="data, methods, models or students.",
        autocompletion=o.offer(list(LISTS)),
    ),
]


def command(what: WhatArg, as_json: o.JsonOpt = False, debug: o.DebugOpt = False) -> None:
    """WHAT is one of data, methods, models and students."""
    if what not in LISTS:
        raise UsageError(f"WHAT: unknown list '{what}': {did_you_mean(what, LISTS)}")
    rows = {"models": models, "data": data, "methods": methods, "students": students}[what]()
    if as_json:
        streams.put(sys.stdout, json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        # Twelve digits of a commit tell revisions apart; --json has them all.
        cells = [
            [re.sub(r"(@[0-9a-f]{12})[0-9a-f]{28}$", r"\1", str(v)) for v in row.values()] for row in rows
        ]
        streams.put(sys.stdout, "\n".join(aligned(cells, left=len(cells[0]))) if cells else "")


def models() -> list[dict[str, Any]]:
    """Aliases with the revision that each is pinned to."""
    from kdcli.models.aliases import MODELS

    return [
        {
            "name": alias.name,
            "repository": f"{alias.repo}@{alias.revision}",
            "package": alias.package[0] if alias.package else "-",
            "summary": alias.summary,
        }
        for alias in MODELS.values()
    ]


def data() -> list[dict[str, Any]]:
    """Data sets that have a name."""
    from kdcli.data.sources import ALIASES

    return [
        {"name": alias.name, "package": alias.package, "summary": alias.summary} for alias in ALIASES.values()
    ]


def methods() -> list[dict[str, Any]]:
    """Methods of every stage, and what those of quantize choose among."""
    from kdcli import registry

    return [
        {"stage": stage, "kind": kind, "name": name, "summary": registry.summary(folder, name)}
        for stage in registry.STAGES
        for folder, kind in registry.kinds(stage)
        for name in registry.names(folder)
    ]


def students() -> list[dict[str, Any]]:
    """Student presets and where their first weights come from."""
    from kdcli.models.aliases import SMALL_STUDENTS, STUDENT_REPOS
    from kdcli.stages.distill.options import STUDENT_PRESETS

    encoders = [
        {
            "name": name,
            "layers": layers,
            "hidden": hidden,
            "weights": f"{STUDENT_REPOS[name].repo}@{STUDENT_REPOS[name].revision}"
            if name in STUDENT_REPOS
            else "initialised from the teacher",
        }
        for name, (layers, hidden) in STUDENT_PRESETS.items()
    ]
    others = [
        {"name": name, "layers": 0, "hidden": width, "weights": "token embeddings from the teacher"}
        for name, width in SMALL_STUDENTS.items()
    ]
    return encoders + others
