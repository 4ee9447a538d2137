"""``kdcli doctor``."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kdcli.cli import options as o
from kdcli.cli import streams
from kdcli.cli.inspect import lines
from kdcli.report.redact import redact

EXAMPLES = """
kdcli doctor
kdcli doctor --json > machine.json
"""

VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def command(as_json: o.JsonOpt = False, debug: o.DebugOpt = False) -> None:
    """Versions, processor, memory, disk, runtimes and caches; good to have in a bug report."""
    with streams.guarded() as stdout:
        found = examine()
        streams.put(
            stdout, json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(found))
        )


def examine() -> dict[str, Any]:
    """Collect the facts; a part that fails is a sentence in its place, not an error."""
    from kdcli import cache
    from kdcli.cli.app import versions
    from kdcli.measure import environment

    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": environment.cpu_name(),
        "isa": environment.isa(),
        "int8_without_saturation": environment.has_vnni(),
        "cores": os.cpu_count(),
        "threads": environment.threads(),
        "memory_bytes": environment.ram_bytes(),
        "memory_available_bytes": _available(),
        "disk_free_bytes": {"here": _free(Path()), "cache": _free(cache.root())},
        "providers": _ask("onnxruntime", lambda module: module.get_available_providers()),
        "cuda_devices": _ask("torch", lambda module: module.cuda.device_count()),
        "variables": _variables(),
        "cache": {
            "path": str(cache.root()),
            "bytes": _bytes_below(cache.root()),
            "problem": cache.problem(),
        },
        "temporary": _temporary(),
        "hub_cache": _hub_cache(),
    }


def _ask(module: str, question: Any) -> Any:
    # A broken installation is what doctor is for: whatever its import raises is an answer.
    try:
        return question(importlib.import_module(module))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _temporary() -> str:
    """Where temporary files go (TMPDIR), or why they can go nowhere."""
    try:
        return tempfile.gettempdir()
    except OSError as error:
        return str(error.strerror or error)


def _variables() -> dict[str, str]:
    """What steers kdcli from outside; a token is only said to be there."""
    known = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    own = {name: value for name, value in os.environ.items() if name.startswith("KDCLI_")}
    return {n: "set" if "TOKEN" in n else redact(v) for n, v in sorted((known | own).items())}


def _available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return next(
            int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration, ValueError):
        return None


def _free(path: Path) -> int | None:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _hub_cache() -> dict[str, Any]:
    place = _ask("huggingface_hub.constants", lambda module: module.HF_HUB_CACHE)
    return {"path": place, "bytes": _bytes_below(Path(place))}


def _bytes_below(root: Path) -> int:
    """Size of the files below a directory; links, which the hub's cache is full of, count nothing."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                total += 0 if os.path.islink(path) else os.path.getsize(path)
            except OSError:
                continue
    return total
