"""Write every file that is made from the code: docs/cli.md, methods.md, exit-codes.md, the JSON Schema and
the completion scripts; and one table of docs/quantize.md.

    python tools/gen.py            write what has changed
    python tools/gen.py --check    print the differences; exit 1 when there are any
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python tools/gen.py"


def exit_codes() -> str:
    """docs/exit-codes.md."""
    from kdcli.errors import MEANING

    rows = "\n".join(f"| {int(code)} | `{code.name}` | {meaning} |" for code, meaning in MEANING.items())
    head = "# Exit codes\n\nOf every command. Scripts may rely on them.\n\n| code | name | meaning |\n|---|---|---|\n"
    return f"{head}{rows}\n"


def methods() -> str:
    """docs/methods.md: every method's docstring and settings."""
    from kdcli import registry

    parts = [
        "# Methods\n\nSettings are given with `--set KEY=VALUE`; `kdcli list methods` lists the names.\n"
    ]
    for stage in registry.STAGES:
        parts.append(f"## {stage}\n")
        for folder, _ in registry.kinds(stage):
            if folder != stage:
                parts.append(f"## {stage}: {folder}\n")
            parts += [part for name in registry.names(folder) for part in _method(folder, name)]
    return "\n".join(parts)


def _method(folder: str, name: str) -> list[str]:
    """A method's docstring, what it declares, and its settings."""
    from kdcli import registry
    from kdcli.stages.prune.criterion import Criterion
    from kdcli.training.terms import Loss

    method = registry.load(folder, name, registry.Method)
    summary, _, text = registry.text(folder, name).partition("\n")
    parts = [f"### {name}\n\n{summary}\n\n```text\n{text.strip()}\n```\n"]
    if isinstance(method, Loss) and method.kind != "response":
        parts.append(f"Default weight in the loss: `{method.weight:g}`.\n")
    if isinstance(method, Criterion):
        parts.append("Prunes: " + ", ".join(f"`{one}`" for one in method.structures) + ".\n")
    if method.because:
        able = " or ".join(registry.ANSWERS[kind] for kind in method.answers)
        parts.append(f"Only for answers that are {able}: {method.because}.\n")
    rows = [
        f"| `{key}` | {_default(field)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for key, field in method.config.model_fields.items()
    ]
    if rows:
        parts.append("\n".join(["| setting | default | |", "|---|---|---|", *rows, ""]))
    return parts


def quantize() -> str:
    """docs/quantize.md, of which one table is generated."""
    from kdcli.stages.quantize import oldest_runtime

    text = (ROOT / "docs/quantize.md").read_text(encoding="utf-8")
    before, start, rest = text.partition("<!-- generated: runtimes -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    return f"{before}{start}{oldest_runtime.table()}{end}{after}"


def _default(field: object) -> str:
    default = field.get_default(call_default_factory=True)  # type: ignore[attr-defined]
    return "required" if field.is_required() else f"`{default}`"  # type: ignore[attr-defined]


def files() -> dict[str, str]:
    """Path below the repository -> content."""
    from kdcli.cli import reference
    from kdcli.report import io

    made = {
        "docs/cli.md": reference.markdown(),
        "docs/exit-codes.md": exit_codes(),
        "docs/methods.md": methods(),
        "docs/quantize.md": quantize(),
        "docs/report.schema.json": io.schema_json(),
    }
    for shell, name in reference.SHELLS.items():
        made[f"completions/{name}"] = reference.completion(shell)
    return made


def main(arguments: list[str]) -> int:
    """Write the files, or with ``--check`` compare them."""
    check = "--check" in arguments
    stale = []
    for name, content in files().items():
        path = ROOT / name
        have = path.read_text(encoding="utf-8") if path.is_file() else ""
        if have == content:
            continue
        stale.append(name)
        if check:
            difference = difflib.unified_diff(
                have.splitlines(keepends=True), content.splitlines(keepends=True), name, f"{name} (generated)"
            )
            sys.stdout.writelines(difference)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run: {COMMAND}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
