"""Write every file that is made from the code: docs/cli.md, methods.md and a page of methods for each stage,
exit-codes.md, the JSON Schema and the completion scripts; and one table of docs/quantize.md.

    python tools/gen.py            write what has changed
    python tools/gen.py --check    print the differences; exit 1 when there are any
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python tools/gen.py"


def exit_codes() -> str:
    """docs/exit-codes.md."""
    from kdcli.errors import MEANING

    rows = "\n".join(f"| {int(code)} | `{code.name}` | {meaning} |" for code, meaning in MEANING.items())
    head = "# Exit codes\n\nOf every command. Scripts may rely on them.\n\n| code | name | meaning |\n|---|---|---|\n"
    return f"{head}{rows}\n"


_LEAD = {
    "distill": "Losses: the terms that `--method` adds to [the loss](../loss.md).",
    "prune": "Criteria: what `--method` may choose for a `--structure`.",
    "lowrank": "Rules: how `--method` finds the factors of a matrix or of a convolution.",
    "quantize": "Schemes: what `--scheme` may choose.",
    "rounding": "Who chooses the integers of `int4`: `--set rounding=NAME`.",
    "smoothing": "What `--set smooth=ALPHA` does before an 8-bit scheme.",
}
"""Folder of methods -> what they are, for its page."""

_SETTINGS = (
    "Settings are given with `--set KEY=VALUE`, or `--set METHOD.KEY=VALUE` for one of several methods."
)


def methods() -> dict[str, str]:
    """docs/methods.md, the index, and docs/methods/STAGE.md: every method's docstring and settings."""
    from kdcli import registry

    index = [
        f"# Methods\n\nOne page per stage, with formula, source and settings of each method. {_SETTINGS}\n"
    ]
    made = {}
    for stage in registry.METHOD_STAGES:
        page = [f"# Methods of {stage}\n\n{_LEAD[stage]} {_SETTINGS}\n"]
        rows = [f"## [{stage}](methods/{stage}.md)\n\n| method | |", "|---|---|"]
        for folder, kind in registry.kinds(stage):
            if folder != stage:
                page.append(f"## {kind.capitalize()}\n\n{_LEAD[folder]}\n")
            for name in registry.names(folder):
                page += _method(folder, name, "##" if folder == stage else "###")
                shown = name if folder == stage else f"{folder}: {name}"
                rows.append(f"| [{shown}](methods/{stage}.md#{name}) | {registry.summary(folder, name)} |")
        index.append("\n".join([*rows, ""]))
        made[f"docs/methods/{stage}.md"] = "\n".join(page)
    return {"docs/methods.md": "\n".join(index), **made}


def _method(folder: str, name: str, level: str) -> list[str]:
    """A method's docstring, what it declares, and its settings."""
    from kdcli import registry
    from kdcli.stages.prune.criterion import Criterion
    from kdcli.training.terms import Loss

    method = registry.load(folder, name, registry.MethodSpec)
    summary, _, text = registry.text(folder, name).partition("\n")
    parts = [f"{level} {name}\n\n{summary}\n\n{markdown(text.strip(chr(10)))}\n"]
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


def markdown(text: str) -> str:
    """A docstring as Markdown: indented paragraphs are formulas, and Source and Differs stand out."""
    made = []
    for part in text.split("\n\n"):
        if part.startswith("    "):
            made.append(_formula(part))
            continue
        plain = re.sub(r"``(.+?)``", r"`\1`", part, flags=re.DOTALL)
        plain = re.sub(r"\$([^$]+)\$", _inline, plain)
        made.append(re.sub(r"(?m)(?:(?<=.)\n)?^(Sources?|Differs): ", r"\n\n**\1:** ", plain).strip("\n"))
    return "\n\n".join(made)


def _formula(part: str) -> str:
    r"""A block of LaTeX; ``\\`` at the end of a line begins a further formula."""
    rows = "\n".join(line[4:] for line in part.splitlines()).split(" \\\\\n")
    if len(rows) > 1:
        rows = [
            "\\begin{aligned}",
            *(f"& {row} \\\\" for row in rows[:-1]),
            f"& {rows[-1]}",
            "\\end{aligned}",
        ]
    return "\n".join(["```math", *rows, "```"])


def _inline(found: re.Match[str]) -> str:
    """A formula inside a sentence, quoted where Markdown would read its signs as its own."""
    formula = found[1].replace("\n", " ")
    spoilt = re.search(r"(?<![A-Za-z0-9])_|\*|\\[^A-Za-z]", formula)
    return f"$`{formula}`$" if spoilt else f"${formula}$"


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


def tables() -> dict[str, str]:
    """As :func:`files`, for those that the command line itself reads: they are written first."""
    from kdcli.cli import flags

    return {"kdcli/cli/flags.json": flags.text(), "kdcli/__init__.pyi": stub()}


_STUB = """# Made by tools/gen.py from the options of the stages; for editors and type checkers.

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Literal, overload

from kdcli.progress import Progress
from kdcli.report.schema import Report

__version__: str
"""


def stub() -> str:
    """kdcli/__init__.pyi: the signatures of ``kdcli.distill`` and its kin."""
    from kdcli.stages import options

    parts = [_STUB, "\n"]
    for stage in options.OPTIONS:
        every = list(options.of_stage(stage).values())
        named = [f"    {one.argument}: {_hint(one)}{_value(one)}," for one in every if not one.flag.argument]
        named = ["    *,", *named, "    progress: Progress | None = None,"]
        first = [one.argument for one in every if one.flag.argument]
        if stage == "evaluate":
            forms = ((f"{first[0]}: {_REF}", "Report"), (f"{first[0]}: Sequence[{_REF}]", "list[Report]"))
            for argument, result in forms:
                head = f"def {stage}(" + ("  # type: ignore[overload-overlap]" if result == "Report" else "")
                lines = ["@overload", head, f"    {argument},", *named, f") -> {result}: ..."]
                parts.append("\n".join([*lines, ""]))
        else:
            arguments = [f"    {name}: {_REF}," for name in first]
            parts.append("\n".join([f"def {stage}(", *arguments, *named, ") -> Report: ...", ""]))
    parts.append(_PREDICT)
    return "".join(parts)


_PREDICT = """def predict(
    model: str | PathLike[str],
    texts: Iterable[str] | Iterable[Sequence[str]],
    *,
    top: int | None = None,
    batch_size: int = 32,
    runtime: Literal["onnx", "torch"] = "onnx",
    device: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, object]]: ...
"""

_REF = "str | PathLike[str]"
_HINTS = {
    "set": "Mapping[str, object]",
    "weight": "Mapping[str, float]",
    "max_size": "int | str",
    "batch_size": "int",
    "rank": "int | str",
}


def _hint(one: Any) -> str:
    """The type of an argument, as what the option takes rather than as what it becomes."""
    kind = str(one.info.annotation)
    if one.argument in _HINTS and "tuple" not in kind:
        found = _HINTS[one.argument]
    elif "tuple[int" in kind:
        found = "int | Sequence[int]"
    elif "tuple[str" in kind:
        found = f"{_REF} | Sequence[{_REF}]" if one.flag.metavar == "MODEL" else "str | Sequence[str]"
    elif "Path" in kind or one.flag.metavar in ("MODEL", "STUDENT", "REF"):
        found = _REF
    else:
        found = next(name for name in ("bool", "int", "float", "str") if name in kind)
    return found if one.info.is_required() else f"{found} | None" if "None" in kind else found


def _value(one: Any) -> str:
    if one.info.is_required():
        return ""
    default = one.info.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, dict):
        return " = ..."
    return f" = {default!r}".replace("'", '"')  # as ruff formats it


def files() -> dict[str, str]:
    """Path below the repository -> content."""
    from kdcli.cli import reference
    from kdcli.report import io

    made = {
        "docs/cli.md": reference.markdown(),
        "docs/exit-codes.md": exit_codes(),
        **methods(),
        "docs/quantize.md": quantize(),
        "docs/report.schema.json": io.schema_json(),
    }
    for shell, name in reference.SHELLS.items():
        made[f"completions/{name}"] = reference.completion(shell)
    return made


def main(arguments: list[str]) -> int:
    """Write the files, or with ``--check`` compare them."""
    check = "--check" in arguments
    stale = _settle(tables(), check)
    stale += _settle(files(), check)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run: {COMMAND}", file=sys.stderr)
    return 1 if check and stale else 0


def _settle(made: dict[str, str], check: bool) -> list[str]:
    """Write or compare files; return the names of those that differ."""
    stale = []
    for name, content in made.items():
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
    return stale


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
