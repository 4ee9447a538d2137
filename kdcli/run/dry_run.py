"""``--dry-run``: resolve everything, estimate memory, disk and time, touch nothing.

No weights are loaded: sizes come from config.json and the safetensors headers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcli import families, tasks
from kdcli.data import sources
from kdcli.inputs import sampling
from kdcli.models import foreign, safety
from kdcli.models.aliases import SMALL_STUDENTS, small_student
from kdcli.progress import Progress
from kdcli.report import gates
from kdcli.request import Request
from kdcli.run import preflight
from kdcli.stages.distill.options import STUDENT_PRESETS, DistillOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.tasks.task import Task

# Floating-point operations a second, for an order of magnitude only. Measured with MiniLM in float32 on two
# AVX-512 cores: 1.1e11 in training, 9e10 at inference; training is halved for machines without AVX-512.
_FLOPS_TRAIN, _FLOPS_RUN = 5e10, 8e10
_TOKENS_A_WORD = 1.4
_SECONDS_A_ROW = 1.5e-4  # of a training step besides its products: measured with a student of 2x128
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
    common, options = request.common, request.options
    found = preflight.check(request)
    names = [one.ref for one in found]
    first = found[0].path
    # A graph is judged without weights.
    files = safety.check_checkpoint(
        first, weights=request.stage != "evaluate" or any(first.glob("*.safetensors"))
    )
    for expression in common.gates.expressions:
        gates.parse_expression(expression)
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
    cost = _flops_a_row(layers, hidden, tokens)
    task = _task(first, files.config, dataset, common.metric)
    facts: dict[str, Any] = {
        "model": " ".join(names),
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
    seconds += 2 * min(test, common.limit or test) * cost / _FLOPS_RUN
    if isinstance(options, DistillOptions):
        from kdcli.stages.distill import stage as distill

        checked = distill.check(request)
        extra = _distill(checked, config, rows, tokens, cost, len(dataset.label_names), facts)
        seconds, memory, written = seconds + extra[0], memory + extra[1], extra[2] + weights
    elif isinstance(options, PruneOptions):
        from kdcli.stages.prune import combined
        from kdcli.stages.prune import plan as pruning

        if combined.is_combined(request):
            parts = combined.check(request)
            chosen, max_drop = "+".join(part.name for part in parts.parts), parts.max_drop
        else:
            pruned = pruning.check(request)
            chosen, max_drop = pruned.name, pruned.max_drop
        facts |= {"structure": options.structure, "method": chosen}
        once = 1024 * 8 * 3 * cost / _FLOPS_TRAIN + options.epochs * rows["train"] * 3 * cost / _FLOPS_TRAIN
        seconds += once
        if max_drop is not None:
            facts["search"] = (
                f"{pruning.TRIES} tries for the smallest model that keeps --max-drop {max_drop:g}"
            )
            seconds += (pruning.TRIES - 1) * once
    elif isinstance(options, LowRankOptions):
        from kdcli.stages.lowrank import stage as factorising

        factorising.settings_of(options.method, common.settings)
        facts |= {"method": options.method}
        seconds += 1024 * 3 * cost / _FLOPS_TRAIN + options.epochs * rows["train"] * 3 * cost / _FLOPS_TRAIN
    elif isinstance(options, QuantizeOptions):
        from kdcli.stages.quantize import stage as quantizing

        said, needed = quantizing.foreseen(request)
        facts |= said
        facts["onnxruntime"] = (
            "as the chosen scheme needs" if needed is None else f"{needed} or newer for model.onnx"
        )
        written = weights // 2
    out = preflight.place(request, found)
    if out is not None:
        facts["output"] = str(out)
    else:
        written = 0
    return DryRun(request.stage, facts, int(memory), int(written), seconds, notes)


def _task(model: Path, config: dict[str, Any], dataset: sources.Dataset, metric: str | None) -> Task:
    """The model's own, or of one without a head what the data are for."""
    names = foreign.labels_of(config, "config.json")
    known = None
    if foreign.task_of(model) is not None:
        known = tasks.recorded(
            foreign.with_outputs(config, None if names is None else len(names)), metric=metric
        )
    return known or tasks.of_kind(dataset.kind, metric)


def _distill(
    checked: Any,
    config: dict[str, Any],
    rows: dict[str, int],
    tokens: float,
    cost: float,
    labels: int,
    facts: dict[str, Any],
) -> tuple[float, int, int]:
    """(seconds, memory bytes, disk bytes) of teacher, outputs and student."""
    from kdcli.stages.distill import fitting
    from kdcli.stages.distill import stage as distill

    options: DistillOptions = checked.options
    size = STUDENT_PRESETS.get(options.student)
    if (named := small_student(options.student)) is not None:
        size = (1, named[1])  # about what a convolution or an LSTM costs; pooled embeddings cost less
    if size is None and "x" in options.student:
        parts = options.student.split("x")
        if len(parts) == 2 and all(p.isdigit() for p in parts):
            size = (int(parts[0]), int(parts[1]))
    vocabulary = int(config.get("vocab_size") or 30000)
    facts |= {"student": options.student, "method": list(options.methods), "strategy": options.strategy}
    architectures = config.get("architectures") or [""]
    has_head = str(architectures[0]).endswith("ForSequenceClassification")
    facts["teacher"] = (
        "has a head" if has_head else "has no head for the task: it is fine-tuned first, and cached"
    )
    train = rows["train"]
    further = fitting.augmented(checked, train * tokens) * train
    texts = train + further
    epochs = options.epochs or fitting.default_epochs(texts * tokens)
    facts["texts"] = f"{train} and {further} made from them, {epochs} epochs"
    seconds = texts * cost / _FLOPS_RUN
    if not has_head:
        size_ = checked.settings.teacher_batch_size
        rounds = checked.settings.teacher_epochs or distill.teacher_epochs(train, labels, size_)
        seconds += rounds * train * 3 * cost / _FLOPS_TRAIN
    logits = 4 * texts * labels
    trainings = 4 if options.control else 1  # each of up to three controls takes as many steps as the student
    if size is None:
        return seconds + trainings * epochs * texts * 3 * cost / _FLOPS_TRAIN, 0, logits
    small = _flops_a_row(*size, tokens)
    seconds += trainings * epochs * texts * (3 * small / _FLOPS_TRAIN + _SECONDS_A_ROW)
    parameters = vocabulary * size[1] + 12 * size[0] * size[1] ** 2
    return seconds, 16 * parameters, 8 * parameters + logits


def _depth(config: dict[str, Any]) -> tuple[int, int]:
    def size(role: str, usual: int) -> int:
        return int(next((config[key] for key in families.spellings(role) if config.get(key)), usual))

    small = str(config.get("model_type")).removeprefix("kdcli-") in SMALL_STUDENTS
    return size("layers", 1 if small else 12), size("hidden", 768)


def _flops_a_row(layers: int, hidden: int, tokens: float) -> float:
    """Floating-point operations of one forward pass: 12 d^2 weights a layer, and the attention products."""
    return 2 * layers * (12 * hidden**2 * tokens + 2 * hidden * tokens**2)


def _tokens(dataset: sources.Dataset) -> float:
    train = next(iter(dataset.splits.values()))
    some = train.take(sampling.positions(None, len(train), 500, sampling.JUDGING_SEED))
    words = sum(len(t.split()) for t in some.first + (some.second or [])) / max(1, len(some))
    return words * _TOKENS_A_WORD + 2


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _show(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)
