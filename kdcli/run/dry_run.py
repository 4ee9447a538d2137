"""``--dry-run``: resolve everything, estimate memory, disk and time, touch nothing.

No weights are loaded: sizes come from config.json and the safetensors headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcli import families, tasks
from kdcli.data import sources
from kdcli.foresight import RUNNING, Sizes, flops_a_row
from kdcli.inputs import sampling
from kdcli.models import foreign, safety
from kdcli.models.aliases import SMALL_STUDENTS
from kdcli.progress import Progress
from kdcli.report import gates
from kdcli.request import Request
from kdcli.run import life, preflight
from kdcli.tasks.task import Task

_TOKENS_A_WORD = 1.4
_FIXED_SECONDS = 15.0


@dataclass
class DryRun:
    """What a stage would read, write and need."""

    stage: str
    facts: dict[str, Any]
    memory_bytes: int
    disk_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {
            "kind": "kdcli.plan",
            "stage": self.stage,
            **self.facts,
            "estimate": {
                "memory_bytes": self.memory_bytes,
                "disk_bytes": self.disk_bytes,
                "seconds": round(self.seconds),
            },
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people."""
        made = [f"{key}: {_show(value)}" for key, value in self.facts.items()]
        minutes = self.seconds / 60
        made.append(
            f"estimate: {_mib(self.memory_bytes)} memory, {_mib(self.disk_bytes)} disk, "
            + (f"{minutes:.0f} minutes" if minutes >= 2 else f"{self.seconds:.0f} seconds")
            + " on two cores (order of magnitude)"
        )
        return [*made, *self.notes, "nothing was written (--dry-run)"]


def plan(request: Request, progress: Progress) -> DryRun:
    """Resolve a request as the runner would, and estimate what it needs.

    Raises:
        KdcliError: Whatever would stop the real run before its work begins.
    """
    common = request.common
    found = preflight.check(request)
    first = found[0].path
    # A graph is judged without weights.
    files = safety.check_checkpoint(
        first, weights=request.stage != "evaluate" or any(first.glob("*.safetensors"))
    )
    request = preflight.settle_data(request, first)
    common = request.common
    ref = common.data
    assert ref is not None
    dataset = preflight.load_data(request, [one.path for one in found])
    rows = {name: len(split) for name, split in dataset.splits.items()}
    tokens = _tokens(dataset)
    config = files.config
    weights = sum(p.stat().st_size for p in files.weights)
    layers, hidden = _depth(config)
    cost = flops_a_row(layers, hidden, tokens)
    task, labels = _task(first, config, dataset, common.metric)
    ranked = any(split.queries is not None for split in dataset.splits.values())
    gates.check(common.gates, task.measurable(ranked))
    facts: dict[str, Any] = {
        "model": " ".join(one.ref for one in found),
        "from": [f"{f.source}: {f.path}" for f in found],
        "family": config.get("model_type"),
        "task": task.name,
        "metric": task.primary,
        "data": ref,
        "rows": [f"{split} {count}" for split, count in rows.items()],
        "labels": len(dataset.label_names),
        "device": common.device,
        "seed": common.seed,
    }
    notes = [note for f in found for note in f.notes] + list(dataset.notes)
    seconds, memory, written = _FIXED_SECONDS, 4 * weights, 2 * weights
    test = rows.get("test", rows.get("validation", 0))
    seconds += 2 * min(test, common.limit or test) * cost / RUNNING
    if request.stage != "evaluate":
        sizes = Sizes(config, rows, tokens, task, task.outputs(labels), weights, cost)
        foreseen = life.stage_of(request).foreseen(request, sizes)
        facts |= foreseen.facts
        seconds, memory = seconds + foreseen.seconds, memory + foreseen.memory
        written = written if foreseen.written is None else foreseen.written
    out = preflight.place(request, found)
    if out is not None:
        facts["output"] = str(out)
    else:
        written = 0
    return DryRun(request.stage, facts, int(memory), int(written), seconds, notes)


def _task(
    model: Path, config: dict[str, Any], dataset: sources.Dataset, metric: str | None
) -> tuple[Task, Sequence[str]]:
    """The model's own with its labels, or of one without a head what the data are for with theirs."""
    if foreign.task_of(model) is None:
        return tasks.of_kind(dataset.kind, metric), dataset.label_names
    names = foreign.labels_of(config, "config.json")
    known = tasks.recorded(foreign.with_outputs(config, None if names is None else len(names)), metric=metric)
    return known or tasks.of_kind(dataset.kind, metric), names or dataset.label_names


def _depth(config: dict[str, Any]) -> tuple[int, int]:
    def size(role: str, usual: int) -> int:
        return int(next((config[key] for key in families.spellings(role) if config.get(key)), usual))

    small = str(config.get("model_type")).removeprefix("kdcli-") in SMALL_STUDENTS
    return size("layers", 1 if small else 12), size("hidden", 768)


def _tokens(dataset: sources.Dataset) -> float:
    train = next(iter(dataset.splits.values()))
    some = train.take(sampling.positions(None, len(train), 500, sampling.JUDGING_SEED))
    words = sum(len(t.split()) for t in some.first + (some.second or [])) / max(1, len(some))
    return words * _TOKENS_A_WORD + 2


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _show(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)
