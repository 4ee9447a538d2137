"""``kdcli inspect``: what is in a model directory, told from its files alone (no weights are loaded)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kdcli import families, tasks
from kdcli.models import foreign, references, safety
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

_SIZES = (
    *(key for role in ("hidden", "layers", "heads", "neurons") for key in families.spellings(role)),
    "widths",
    "vocab_size",
    "max_position_embeddings",
)


def describe(ref: str, *, offline: bool = False) -> dict[str, Any]:
    """Describe a model: where it is, its architecture, labels, tensors, files and history.

    Raises:
        KdcliError: It cannot be found, or it is broken or unsafe; then the message is the verdict.
    """
    found = references.resolve(ref, offline=offline)
    files = foreign.check(found.path)
    config = files.config
    tensors: dict[str, Any] = {}
    for path in files.weights:
        tensors |= safety.read_header(path)
    tensors.pop("__metadata__", None)
    by_type: dict[str, int] = {}
    for entry in tensors.values():
        by_type[entry["dtype"]] = by_type.get(entry["dtype"], 0) + math.prod(entry["shape"])
    described: dict[str, Any] = {
        "model": ref,
        "source": found.source,
        "path": str(found.path),
        "repo": found.repo,
        "revision": found.revision,
        "family": config.get("model_type"),
        "architecture": (config.get("architectures") or [None])[0],
        "sizes": {key: config[key] for key in _SIZES if config.get(key) is not None},
        "labels": foreign.labels_of(config, "config.json") or [],
        "task": None,
        "tensors": len(tensors),
        "values_by_type": dict(sorted(by_type.items())),
        "files": {p.name: p.stat().st_size for p in sorted(found.path.iterdir()) if p.is_file()},
        "safe": "safetensors only; no remote code",
        "onnx": _onnx(found.path / "model.onnx"),
    }
    log = found.path / "kdcli.json"
    quantised = False
    if not log.is_file():
        described |= _judged(found.path, files)
    else:
        from kdcli.models.transforms import read_log
        from kdcli.report import io

        read = read_log(found.path)
        assert read is not None
        described |= _answers(tasks.recorded(config) or CLASSIFICATION, described["labels"])
        quantised = read.quantised is not None
        described["transforms"] = [_short(t.model_dump(mode="json")) for t in read.transforms]
        described["lineage"] = [
            {key: getattr(entry, key) for key in ("stage", "method", "model", "metric", "value")}
            for entry in io.lineage(read.lineage)
        ]
    if described["task"] is None:
        described["possible"] = ["distill"]
    elif quantised:
        described["possible"] = ["evaluate", "predict", "any stage with --dequantize"]
    else:
        described["possible"] = families.possible(str(config.get("model_type")))
    return described


def _answers(task: Task, labels: list[str]) -> dict[str, Any]:
    """What the answers are and how they are judged."""
    found: dict[str, Any] = {"task": task.name, "metric": task.primary}
    stored: Any = task.config_fields().get(tasks.THRESHOLDS)
    return found | ({} if stored is None else {"thresholds": dict(zip(labels, stored, strict=True))})


def _judged(path: Path, files: foreign.CheckpointFiles) -> dict[str, Any]:
    """What the stages find before they load a model that kdcli did not write: the same refusals, the same labels."""
    from kdcli.models import checkpoint, ownership

    with checkpoint.quiet():
        verdict = ownership.judge(path, files)
    warnings = [warning.message for warning in verdict.warnings]
    if not verdict.has_head:
        head = "none: distill fine-tunes it first, no other stage takes it"
        return {"head": head, "warnings": warnings}
    told = {"head": verdict.task.name, "warnings": warnings, "labels": verdict.labels}
    return told | _answers(verdict.task, verdict.labels)


def _onnx(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [v.name for v in model.graph.input],
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
    }


def _short(transform: dict[str, Any]) -> dict[str, Any]:
    """Counts instead of index lists: what a person wants to know of a cut is how much is left."""
    if transform["op"] == "cut":
        for kind in ("heads", "neurons"):
            transform[kind] = {layer: len(kept) for layer, kept in transform[kind].items()}
    if isinstance(transform.get("tensors"), list):
        transform["tensors"] = len(transform["tensors"])
    return transform
