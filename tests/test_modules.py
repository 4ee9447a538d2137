"""No module is asked for what it may or may not have: methods declare themselves in typed objects."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kdcli

ROOT = Path(kdcli.__file__).parent
FILES = sorted(
    [*ROOT.rglob("*.py"), *(ROOT.parent / "tools").glob("*.py"), *(ROOT.parent / "benchmarks").glob("*.py")]
)


@cache
def is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_one(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")


def modules(tree: ast.AST) -> set[str]:
    """Names of a file that stand for modules of kdcli, or for what ``import_module`` returned."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.startswith("kdcli")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdcli"):
            found |= {a.asname or a.name for a in node.names if is_module(f"{node.module}.{a.name}")}
        elif isinstance(node, ast.Assign) and imports_one(node.value):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def asked(tree: ast.AST) -> Iterator[str]:
    """Questions to modules, as they are written."""
    known = modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            first = node.args[0]
            if imports_one(first) or (isinstance(first, ast.Name) and first.id in known):
                yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id == "ModuleType":
            yield "a module is handed on: ModuleType"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT.parent).as_posix())
def test_no_module_is_asked_what_it_has(path: Path) -> None:
    assert list(asked(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "from kdcli.training.losses import dkd\nhasattr(dkd, 'check')",
        "import importlib\nmade = importlib.import_module('x')\ngetattr(made, 'KIND', None)",
        "from importlib import import_module\ngetattr(import_module('x'), 'KIND')",
        "def f(module: ModuleType): ...",
    ],
)
def test_the_check_sees_a_question(text: str) -> None:
    assert len(list(asked(ast.parse(text)))) == 1


#: Names that many files define on purpose: each means the same thing in the place where it is looked for.
SAME_EVERYWHERE = {"Config": "the settings of a method, in the method's own file"}


def named(tree: ast.Module) -> Iterator[str]:
    """Classes and type aliases of a file; a type variable means nothing outside it."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
            for target in node.targets:
                if isinstance(target, ast.Name) and re.match("_?[A-Z][a-z]", target.id):
                    yield target.id


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for name in named(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert twice.keys() <= SAME_EVERYWHERE.keys(), {
        n: f for n, f in twice.items() if n not in SAME_EVERYWHERE
    }
    assert SAME_EVERYWHERE.keys() <= twice.keys()
