"""What the source of kdcli spells: its names and strings, without comments and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kdcli

ROOT = Path(kdcli.__file__).parent


def files(*left_out: str) -> list[Path]:
    """Every file of the package but those under some of its folders or files."""
    found = sorted(ROOT.rglob("*.py"))
    return [p for p in found if not any(p.relative_to(ROOT).is_relative_to(part) for part in left_out)]


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string, parts of f-strings among them; a string that is a statement says something."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.lineno, node.value


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, argument, keyword and attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def chains(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, "a.b") of every path of attributes without its start: ``x.bert.pooler`` is "bert.pooler"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts: list[str] = []
            at: ast.expr = node
            while isinstance(at, ast.Attribute):
                parts.insert(0, at.attr)
                at = at.value
            yield node.lineno, ".".join(parts)


def tree_of(path: Path) -> ast.Module:
    """The tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))
