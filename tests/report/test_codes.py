"""docs/report.md lists every warning code that there is, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import kdcli

ROOT = Path(kdcli.__file__).parent
DOCS = ROOT.parent / "docs" / "report.md"
CODE = re.compile(r"[a-z]+(-[a-z]+)*")


def codes_of(source: str) -> set[str]:
    """Codes in one file: ``code=`` of a call, and the first of two in what becomes part of ``warnings``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "code":
                    found |= texts(keyword.value)
            if isinstance(node.func, ast.Attribute) and "warnings" in ast.unparse(node.func.value):
                found |= {code for one in node.args for code in pairs(one)}
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            if ast.unparse(node.returns) in ("list[tuple[str, str]]", "Iterator[tuple[str, str]]"):
                found |= pairs(node)
        elif isinstance(node, ast.keyword) and node.arg == "warnings":
            found |= pairs(node.value)
    return found


def texts(node: ast.expr) -> set[str]:
    """The code itself; of a formatted one every form that it can have."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):  # the answers' own: with and without ``input-``
        last = node.values[-1]
        assert isinstance(last, ast.Constant), ast.unparse(node)
        return {last.value, f"input-{last.value}"}
    return set()


def pairs(node: ast.AST) -> set[str]:
    """First elements of pairs that look like a code."""
    return {
        one.elts[0].value
        for one in ast.walk(node)
        if isinstance(one, ast.Tuple)
        and len(one.elts) == 2
        and isinstance(one.elts[0], ast.Constant)
        and isinstance(one.elts[0].value, str)
        and CODE.fullmatch(one.elts[0].value)
        and "-" in one.elts[0].value
    }


def test_every_code_is_listed_and_no_other() -> None:
    used: set[str] = set()
    for path in ROOT.rglob("*.py"):
        used |= codes_of(path.read_text(encoding="utf-8"))
    table = DOCS.read_text(encoding="utf-8").partition("## Warnings")[2]
    listed = {
        code
        for line in table.splitlines()
        if line.startswith("| `")
        for code in re.findall(r"`([a-z-]+)`", line.split("|")[1])
    }
    assert "worse" in used
    assert "no-gain" in used
    assert used == listed, f"not listed: {sorted(used - listed)}; nowhere used: {sorted(listed - used)}"


def test_the_scan_sees_the_forms_in_which_codes_are_written() -> None:
    assert codes_of('Warning_(code="a-b", message="x")') == {"a-b"}
    assert codes_of('Warning_(code=f"{p}a", message="x")') == {"a", "input-a"}
    assert codes_of('found.warnings.append(("a-b", "x"))') == {"a-b"}
    assert codes_of('def f() -> list[tuple[str, str]]:\n    return [("a-b", text)]') == {"a-b"}
    assert codes_of('replace(named, warnings=[*named.warnings, ("a-b", "x")])') == {"a-b"}
