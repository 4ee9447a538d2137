"""The one life of a stage.

resolve -> check the chain -> data -> load -> seed, device -> measure before -> apply -> save ->
reload from disk -> export -> parity -> measure after -> gates -> report -> rename.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import __version__, memory, processes
from kdcli.data import labels as label_names
from kdcli.data import text
from kdcli.data.sources import Dataset
from kdcli.data.text import Encoded
from kdcli.errors import InputError, ResourceError, UsageError
from kdcli.measure import environment, quality
from kdcli.models import activations, mapped, placement, transforms
from kdcli.models import checkpoint as checkpoints
from kdcli.models.aliases import MODELS
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.report import card, gates, io
from kdcli.report.redact import redact
from kdcli.report.schema import (
    Artifact,
    DataInfo,
    Delta,
    LineageEntry,
    Measurement,
    ModelInfo,
    Report,
    Warning_,
)
from kdcli.stages import early, measuring, output
from kdcli.stages import graph as graphs
from kdcli.stages.base import Request
from kdcli.stages.context import Applied, Context
from kdcli.stages.timing import Timings
from kdcli.training import distributed

BATCH_SIZES = (1, 32)


@dataclass
class Outcome:
    """What a finished stage hands back; ``report.exit_code`` is the verdict."""

    path: Path
    report: Report
    reports: list[Report] = field(default_factory=list)


def run(request: Request, progress: Progress) -> Outcome | None:
    """Run one stage from its input to its published output directory.

    Returns:
        What came out; None in every process but the first, when several share the training.

    Raises:
        KdcliError: Anything a user can act on; nothing half-written is left behind.
    """
    if request.stage == "evaluate":
        from kdcli.stages import evaluate

        return evaluate.run(request, progress) if processes.first() else None
    timings = Timings()
    with timings.phase("resolve"):
        found = early.check(request)[0]
        source = found.ref
        for note in found.notes:
            progress.note(note)
        out = early.place(request, [found])
        assert out is not None
        device = device_of(request.common.device)
        distributed.start(device)
        request = early.settle_data(request, found.path)
        dataset = load_data(request, [found.path], progress)
    seed_everything(request.common.seed)
    with timings.phase("load"):
        # A teacher that is larger than the device waits in memory, and is spread when it has to answer.
        home = device if placement.fits(found.path, device) else torch.device("cpu")
        checkpoint = checkpoints.load(found.path, labels=dataset.label_names, device=home)
        if request.dequantize:
            activations.detach(checkpoint.model)
        stage = importlib.import_module(f"kdcli.stages.{request.stage}")
        if not checkpoint.has_head and request.stage != "distill":
            raise InputError(
                f"'{source}' has no classification head",
                "fine-tune it first, or distill from it: kdcli distill --teacher MODEL --student tiny",
            )
        encoded = Splits(dataset, checkpoint)
    context = Context(
        request=request,
        checkpoint=checkpoint,
        dataset=dataset,
        encoded=encoded,
        device=device,
        seed=request.common.seed,
        progress=progress,
        resume_dir=output.resume_directory(out),
    )
    if not processes.first():
        _follow(context, stage)
        return None
    needed = 6 * _weights_bytes(found.path) + (64 << 20)
    with output.building(out, needed) as work:
        report = _live(context, stage, source, work, timings)
        output.publish(work, out)
    shutil.rmtree(output.resume_directory(out), ignore_errors=True)
    return Outcome(out, report, [report])


def _follow(context: Context, stage: Any) -> None:
    """What the other processes of a run do: their share of the training, in the same order."""
    if hasattr(stage, "prepare"):
        stage.prepare(context)
    seed_everything(context.seed)
    stage.apply(context)


def _live(context: Context, stage: Any, source: str, work: Path, timings: Timings) -> Report:
    """Everything between loading and publishing; returns the report that is in ``work``."""
    request, progress = context.request, context.progress
    threads = environment.threads()
    if hasattr(stage, "prepare"):
        with timings.phase("prepare"):
            stage.prepare(context)
    split, rows = measured_rows(context.encoded, None, request.common.limit)
    conditions = measuring.Conditions(
        threads=threads,
        device=session_device(context.device),
        batch_sizes=BATCH_SIZES,
        runtimes=("onnx",),
        timings=timings,
        progress=progress,
    )

    progress.phase("measure before")
    input_graph, warnings = graphs.of_input(
        context.checkpoint, context.encoded[split], threads=threads, timings=timings, progress=progress
    )
    context.input_graph = input_graph
    before = measuring.measure(context.checkpoint, input_graph, rows, split, conditions, title="before")
    given, input_labels = context.checkpoint, list(context.checkpoint.labels)
    first = not given.log.lineage
    lineage = lineage_of(given, source, before.measurement)

    progress.phase(request.stage)
    seed_everything(context.seed)
    large = (
        _weights_bytes(context.checkpoint.path) >= mapped.LARGE
    )  # the next step comes on top of what is kept
    if large:
        memory.give_back()
    with timings.phase("apply"):
        applied: Applied = stage.apply(context)
    with timings.phase("save"):
        entry = LineageEntry(
            stage=request.stage,
            method=applied.method.name,
            report_sha256=None,
            model=source,
            accuracy=None,
            params=applied.method.params,
        )
        applied.checkpoint.log.lineage = [e.model_dump(mode="json") for e in (*lineage, entry)]
        checkpoints.save(applied.checkpoint, work, integers=applied.integers, half=applied.half)
    for used in (given, applied.checkpoint):
        if (
            used.placed is None
        ):  # its weights are on the disk; from here on only its tokenizer and graph are needed
            used.model.to("meta")
    if large:
        memory.give_back()
    with timings.phase("reload"):
        after_model = checkpoints.load(work, device=context.device, in_file=True)
    after_encoded, after_rows = context.encoded[split], rows
    if after_model.tokenizer.get_vocab() != given.tokenizer.get_vocab():
        with timings.phase("data"):  # what ships reads the texts in its own tokens
            own = Splits(context.dataset, after_model)
            after_encoded, after_rows = own[split], measured_rows(own, split, request.common.limit)[1]

    progress.phase("export")
    graph = graphs.build(
        after_model,
        work / graphs.FILE,
        after_encoded,
        threads=threads,
        timings=timings,
        progress=progress,
        rewrite=applied.rewrite_onnx,
        attention=applied.fusion,
        exact=applied.exact,
        properties={"stage": request.stage, "lineage": " > ".join(e.stage for e in (*lineage, entry))},
    )
    progress.phase("measure after")
    after = measuring.measure(after_model, graph.path, after_rows, split, conditions, title="after")
    progress.phase("measure latency")
    measuring.time_together(
        [
            measuring.Timed(given, input_graph, rows, before),
            measuring.Timed(after_model, graph.path, after_rows, after),
        ],
        conditions,
    )
    if first:  # the input's latencies are known only now
        lineage[0].params = {"measurement": before.measurement.model_dump(mode="json")}
        after_model.log.lineage = [e.model_dump(mode="json") for e in (*lineage, entry)]
        transforms.write_log(after_model.log, work)

    with timings.phase("report"):
        delta = compare(before.measurement, after.measurement)
        assert rows.labels is not None
        order = [input_labels.index(name) for name in after_model.labels]
        old = before.logits[:, order].argmax(1)
        new = after.logits.argmax(1)
        delta = delta.model_copy(
            update={
                "agreement": float((old == new).mean()),
                "p_value": quality.mcnemar(old, new, rows.labels),
            }
        )
        entry = entry.model_copy(update={"accuracy": accuracy_of(after.measurement)})
        method = applied.method.model_copy(update={"detail": applied.method.detail | {"onnx": graph.detail}})
        warnings = [
            *warnings,
            *of_data(context.dataset),
            *applied.warnings,
            *graph.warnings,
            *honest(delta, after.measurement),
        ]
        judged = gates.judge(request.common.gates, before.measurement, after.measurement, delta)
        report = Report(
            schema_version=1,
            kind="kdcli.report",
            complete=True,
            exit_code=0,
            kdcli_version=__version__,
            stage=request.stage,
            command=[redact(part) for part in request.argv],
            config=config_of(request),
            model=ModelInfo(
                source=redact(source),
                family=after_model.model_type,
                task="text-classification",
                labels=after_model.labels,
            ),
            data=data_info(context.dataset),
            before=before.measurement,
            after=after.measurement,
            delta=delta,
            method=method,
            parity=graph.parity,
            gates=judged,
            lineage=[*lineage, entry],
            environment=environment.environment(str(context.device), context.seed),
            timings={},
            warnings=unique(warnings),
            artifacts=[],
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        report = report.model_copy(update={"exit_code": int(report.verdict)})
        return finish(report, work, timings)


def finish(report: Report, work: Path, timings: Timings) -> Report:
    """Write the model card, list the artifacts, then report.json, which marks the directory complete."""
    first = MODELS.get(report.lineage[0].model) if report.lineage else None
    base_model = None if first is None else first.repo
    (work / "README.md").write_text(card.card(report, base_model=base_model), encoding="utf-8")
    artifacts = [
        Artifact(path=path.relative_to(work).as_posix(), bytes=path.stat().st_size, sha256=io.sha256_of(path))
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name != "report.json"
    ]
    report = report.model_copy(update={"artifacts": artifacts, "timings": timings.rounded()})
    io.write(report, work)
    return report


def device_of(name: str) -> torch.device:
    """Turn ``auto|cpu|cuda[:N]|mps`` into a device; a named one is a demand.

    Raises:
        ResourceError: The device is not there.
    """
    if name in ("auto", "cuda") and processes.count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", processes.local_rank())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()):
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ResourceError(
            f"device '{name}' was asked for, but torch sees {have} CUDA devices", "pass --device cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("device 'mps' was asked for, but it is not available here", "pass --device cpu")
    if kind == "cuda":
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", name)
    return torch.device(name)


def session_device(device: torch.device) -> str:
    """CUDA models are timed on CUDA where this onnxruntime can; anything else is timed on the CPU."""
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return str(device)
    return "cpu"


def seed_everything(seed: int) -> None:
    """Seed every generator and ask for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def load_data(request: Request, models: Sequence[Path], progress: Progress) -> Dataset:
    """:func:`kdcli.stages.early.load_data`, and say what there is to say of the data."""
    common = request.common
    assert common.data is not None
    said = {"default": "the default; --data names another", "model": "as in the model's own report"}
    if (origin := request.origins.get("data", "flag")) in said:
        progress.note(f"data: {common.data} ({said[origin]})")
    dataset = early.load_data(request, models)
    for note in dataset.notes:
        progress.note(note)
    return dataset


class Splits(Mapping[str, Encoded]):
    """The splits of a data set, tokenised for one checkpoint, labels aligned to its own by name.

    A split is tokenised when it is first asked for: a stage that never trains need not wait for the
    training rows.
    """

    def __init__(self, dataset: Dataset, checkpoint: Checkpoint) -> None:
        self._dataset, self._checkpoint = dataset, checkpoint
        self._index = label_names.align(
            dataset.label_names, checkpoint.labels, ids=dataset.ids, option=dataset.ids_option
        )
        self._made: dict[str, Encoded] = {}

    def __getitem__(self, split: str) -> Encoded:
        if split not in self._made:
            made, rows = self._checkpoint, self._dataset.splits[split]
            self._made[split] = text.encode(rows, made.tokenizer, made.max_length, self._index)
        return self._made[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dataset.splits)

    def __len__(self) -> int:
        return len(self._dataset.splits)

    def __contains__(self, split: object) -> bool:
        return split in self._dataset.splits


def measured_rows(
    encoded: Mapping[str, Encoded], split: str | None, limit: int | None
) -> tuple[str, Encoded]:
    """The rows that quality is measured on: ``test`` where there is one, else ``validation``.

    Raises:
        UsageError: There is no such split.
    """
    name = split or ("test" if "test" in encoded else "validation")
    if name not in encoded:
        raise UsageError(f"the data has no split '{name}'; it has {', '.join(sorted(encoded))}")
    rows = encoded[name]
    if limit is not None and limit < len(rows):
        picked = np.sort(np.random.default_rng(0).choice(len(rows), limit, replace=False))
        rows = rows.take(picked)
    return name, rows


def compare(before: Measurement, after: Measurement) -> Delta:
    """The numbers of two measurements against each other; None where either lacks one."""

    def p50(m: Measurement) -> float | None:
        return next((x.p50_ms for x in m.latency if x.batch == 1), None)

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    drop = None
    if before.quality is not None and after.quality is not None:
        drop = after.quality.accuracy.value - before.quality.accuracy.value
    return Delta(
        accuracy=drop,
        size_ratio=ratio(before.size.onnx_bytes, after.size.onnx_bytes),
        speedup=ratio(p50(before), p50(after)),
        agreement=None,
        p_value=None,
    )


def honest(delta: Delta, after: Measurement) -> list[Warning_]:
    """Say in words what a table of ratios hides."""
    found = []
    if delta.speedup is not None and delta.speedup < 0.98:
        found.append(
            Warning_(
                code="slower", message=f"slower: {1 / delta.speedup:.2f} times the input's latency at batch 1"
            )
        )
    if delta.size_ratio is not None and delta.size_ratio < 0.98:
        found.append(
            Warning_(
                code="bigger", message=f"bigger: model.onnx is {1 / delta.size_ratio:.2f} times the input's"
            )
        )
    noise = None if after.quality is None else after.quality.accuracy.stderr
    if delta.accuracy is not None and noise is not None and delta.accuracy < -2 * noise:
        points = f"accuracy fell by {-100 * delta.accuracy:.1f} points, more than noise"
        found.append(Warning_(code="accuracy", message=points))
    return found


def accuracy_of(measurement: Measurement) -> float | None:
    """The primary metric, where it was measured."""
    return None if measurement.quality is None else measurement.quality.accuracy.value


def lineage_of(checkpoint: Checkpoint, source: str, before: Measurement) -> list[LineageEntry]:
    """The stages that led to this checkpoint; a model that kdcli did not make starts its own lineage.

    The first entry keeps its whole measurement, so that a later ``evaluate`` can compare with it.
    """
    entries = [LineageEntry.model_validate(e) for e in checkpoint.log.lineage]
    if not entries:
        first = LineageEntry(
            stage="input",
            method="",
            report_sha256=None,
            model=redact(source),
            accuracy=accuracy_of(before),
            params={"measurement": before.model_dump(mode="json")},
        )
        return [first]
    report = checkpoint.path / "report.json"
    if report.is_file():
        update = {"report_sha256": io.sha256_of(report), "accuracy": accuracy_of(before)}
        entries[-1] = entries[-1].model_copy(update=update)
    return entries


def config_of(request: Request) -> dict[str, Any]:
    """Every resolved option with where its value came from."""
    common = asdict(request.common)
    limits = common.pop("gates")
    values = common | asdict(request.options) | limits
    for name in ("debug",):
        values.pop(name, None)

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return redact(str(value))
        if isinstance(value, str):
            return redact(value)
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return {
        name: {"value": plain(value), "origin": request.origins.get(name, "default")}
        for name, value in sorted(values.items())
    }


def data_info(dataset: Dataset) -> DataInfo:
    """Which rows were used."""
    rows = {name: len(split) for name, split in dataset.splits.items()}
    return DataInfo(ref=redact(dataset.ref), fingerprint=dataset.fingerprint, rows=rows)


def of_data(dataset: Dataset) -> list[Warning_]:
    """What the report says of the data."""
    return [Warning_(code=code, message=message) for code, message in dataset.warnings]


def unique(warnings: list[Warning_]) -> list[Warning_]:
    return list({(w.code, w.message): w for w in warnings}.values())


def _weights_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))
