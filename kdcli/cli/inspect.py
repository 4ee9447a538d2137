"""``kdcli inspect``."""

from __future__ import annotations

import json
from typing import Any

from kdcli.cli import options as o
from kdcli.cli import streams
from kdcli.cli.console import clean

EXAMPLES = """
kdcli inspect out/int8
kdcli inspect minilm --json
"""


def command(
    model: o.ModelArg, as_json: o.JsonOpt = False, offline: o.OfflineOpt = False, debug: o.DebugOpt = False
) -> None:
    """Sizes, labels, tensors, history, and whether it is safe to load; no weights are loaded."""
    ref = streams.reference(model)
    with streams.guarded() as stdout:
        from kdcli.models import inspect as inspection

        found = inspection.describe(ref, offline=offline)
        text = json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(found))
        streams.put(stdout, text)


def lines(found: Any, indent: str = "") -> list[str]:
    """Nested facts as indented lines; absent ones are left out."""
    made = []
    for key, value in found.items():
        if value in (None, [], {}):
            continue
        if isinstance(value, dict):
            made += [f"{indent}{clean(key)}:", *lines(value, indent + "  ")]
        elif isinstance(value, list) and isinstance(value[0], dict):
            made.append(f"{indent}{key}:")
            made += [
                f"{indent}  - " + clean(", ".join(f"{k} {v}" for k, v in one.items() if v not in (None, "")))
                for one in value
            ]
        else:
            shown = (
                ", ".join(map(str, value))
                if isinstance(value, list)
                else f"{value:,}"
                if type(value) is int
                else value
            )
            made.append(f"{indent}{clean(key)}: {clean(str(shown))}")
    return made
