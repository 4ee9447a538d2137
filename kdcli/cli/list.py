"""``kdcli list``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli import options as o
from kdcli.cli import streams
from kdcli.cli.table import aligned
from kdcli.errors import UsageError, did_you_mean

LISTS = (
    *("data", "families", "methods", "models", "schemes", "strategies", "structures", "students", "tasks"),
)

EXAMPLES = """
kdcli list models
kdcli list tasks
kdcli list methods --json
"""

WhatArg = Annotated[
    str,
    typer.Argument(
        metavar="WHAT",
        help=f"{', '.join(LISTS[:-1])} or {LISTS[-1]}.",
        autocompletion=o.offer(list(LISTS)),
    ),
]


def command(what: WhatArg, as_json: o.JsonOpt = False, debug: o.DebugOpt = False) -> None:
    """WHAT is what a flag takes, such as models for --teacher or schemes for --scheme, or what kdcli knows."""
    if what not in LISTS:
        raise UsageError(f"WHAT: unknown list '{what}': {did_you_mean(what, LISTS)}")
    rows = {
        "data": data,
        "families": families,
        "methods": methods,
        "models": models,
        "schemes": schemes,
        "strategies": strategies,
        "structures": structures,
        "students": students,
        "tasks": tasks,
    }[what]()
    if as_json:
        streams.put(sys.stdout, json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        # Twelve digits of a commit tell revisions apart; --json has them all.
        cells = [
            [re.sub(r"(@[0-9a-f]{12})[0-9a-f]{28}$", r"\1", _cell(v)) for v in row.values()] for row in rows
        ]
        streams.put(sys.stdout, "\n".join(aligned(cells, left=len(cells[0]))) if cells else "")


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


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
        for stage in registry.METHOD_STAGES
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


def tasks() -> list[dict[str, Any]]:
    """What models answer, and how answers are judged: the primary metric first."""
    from kdcli import tasks as registered
    from kdcli.data.wanted import SAID

    made = [registered.get(name) for name in registered.names()]
    return [
        {
            "name": task.name,
            "answer": SAID[task.kind],
            "metrics": [task.primary, *(name for name in task.metrics if name != task.primary)],
            "summary": registered.summary(task.name),
        }
        for task in made
    ]


def families() -> list[dict[str, Any]]:
    """Architectures by their ``model_type``, and what can be done with each."""
    from kdcli import families as known

    return [
        {"name": name, "possible": known.possible(name), "summary": known.summary(name)}
        for name in known.every()
    ]


def strategies() -> list[dict[str, Any]]:
    """Who teaches whom."""
    from kdcli.stages.distill.options import STRATEGIES

    return [{"name": name, "summary": text} for name, text in STRATEGIES.items()]


def structures() -> list[dict[str, Any]]:
    """What prune removes, with the method that it uses by itself."""
    from kdcli import registry
    from kdcli.stages.prune.options import STRUCTURES

    return [
        {"name": name, "method": method, "summary": registry.summary("prune", method)}
        for name, method in STRUCTURES.items()
    ]


def schemes() -> list[dict[str, Any]]:
    """Number formats of quantize."""
    from kdcli import docstrings, registry
    from kdcli.stages.quantize import options

    auto = docstrings.first_line_of(Path(options.__file__).with_name("auto.py"))
    return [
        {"name": name, "summary": auto if name == "auto" else registry.summary("quantize", name)}
        for name in options.SCHEMES
    ]
