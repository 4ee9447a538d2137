"""Imports go one way: from the command line through runs and stages down to models, data, reports and errors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kdcli

ROOT = Path(kdcli.__file__).parent
# A higher number may import a lower one. Equal numbers are peers: they may not import each other.
LEVEL = {
    "cli": 11,
    "api": 11,
    "run": 10,
    "stages": 9,
    "training": 8,
    "probe": 7,
    "context": 6,
    "measure": 6,
    "export": 5,
    "inputs": 4,
    "request": 5,
    "options": 4,
    "models": 3,
    "data": 3,
    "registry": 3,
    "tasks": 2,
    "families": 2,
    "report": 1,
    "names": 0,
    "docstrings": 0,
    "cache": 0,
    "devices": 1,
    "memory": 0,
    "foresight": 4,
    "progress": 0,
    "timing": 0,
    "processes": 0,
    "atomic": -1,
    "input_names": -1,
    "interrupts": -2,
    "errors": -3,
}


def area(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "kdcli" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if len(relative.parts) == 1 and relative.stem not in LEVEL:
        return
    own = relative.parts[0].removesuffix(".py")
    for module in imports(path):
        other = area(module)
        if other is None or other == own or other == "__version__":
            continue
        assert other in LEVEL, f"{relative} imports {module}, which has no level"
        assert LEVEL[other] < LEVEL[own], f"{relative} ({own}) must not import {module} ({other})"


STAGES = ("distill", "prune", "lowrank", "quantize", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_never_imports_another(stage: str) -> None:
    for path in (ROOT / "stages" / stage).rglob("*.py"):
        for module in imports(path):
            for other in STAGES:
                assert other == stage or not module.startswith(f"kdcli.stages.{other}"), f"{path}: {module}"


def test_every_file_has_a_level() -> None:
    for path in FILES:
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert name in LEVEL or name in ("__init__", "__main__"), name
