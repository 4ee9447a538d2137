"""What is computed once about a teacher: its fine-tuning on the task, and its outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import cache, families
from kdcli.context import Context
from kdcli.export import sessions
from kdcli.inputs import batching, text
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.text import Encoded
from kdcli.measure import measurement
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.training import distributed, number_head, resumable
from kdcli.training.first_token import first_token_only
from kdcli.training.label_loss import label_loss
from kdcli.training.loop import FitOptions
from kdcli.training.resumable import TrainingId
from kdcli.training.terms import Needs

_FORMAT = 6  # raise it when the same inputs would give other cached content
_BATCH_TOKENS = 4096


def fine_tuned(
    context: Context, teacher: Checkpoint, options: FitOptions
) -> tuple[Checkpoint, dict[str, Any]]:
    """Fine-tune a teacher that has no head for the task, or take it from the cache.

    The cache key covers the teacher's files, the tokenised rows with their labels, the label names, the metric that
    chooses the epoch, and the options, so that nothing else can be mistaken for it.

    Args:
        context: Whose ``train`` and ``validation`` rows are used; rows without a label take no part.
        teacher: Its head is new; ``labels`` are the task's. It is trained in place.
        options: How to train.

    Returns:
        The fine-tuned teacher, loaded from the cache, and what was done, for the report.
    """
    encoded, device, progress = context.encoded, context.device, context.progress
    labels = encoded["train"].labels
    assert labels is not None
    first = teacher.task.first_logits(labels[teacher.task.known(labels)])
    name = cache.key(
        format=_FORMAT,
        task=[teacher.task.name, teacher.task.primary],  # the metric chooses the epoch
        first=None if first is None else first.tolist(),
        unit=number_head.deviation(teacher.task, labels),
        model=checkpoints.weights_digest(teacher.path),
        train=text.fingerprint(encoded["train"]),
        validation=text.fingerprint(encoded["validation"]),
        labels=teacher.labels,
        options=asdict(options),
        device=device.type,
    )
    place = cache.entry("teachers", name)
    facts = place / "fit.json"
    if cache.intact(place):
        detail = json.loads(facts.read_text(encoding="utf-8"))
        progress.note(f"fine-tuned teacher from the cache: {place}")
        return checkpoints.load(place, device=device), {**detail, "cached": True, "path": str(place)}
    progress.note("the teacher has no head for this task: fine-tuning it first (once; the result is cached)")
    train = encoded["train"]
    assert train.labels is not None
    train = train.take(np.flatnonzero(teacher.task.known(train.labels)))
    assert train.labels is not None
    teacher.task = teacher.task.opened()
    number_head.start(teacher, train.labels)
    with first_token_only(teacher, Needs()):
        training = TrainingId(title="fine-tuning the teacher", place="teacher", identity={"teacher": name})
        loss = label_loss(teacher.task, train.labels, device)
        result = resumable.run(context, training, teacher, train, loss, options)
    teacher.has_head = True
    teacher.task = measurement.decided(teacher, encoded["validation"], progress)
    detail = {"fine_tuned": True, "key": name, **result.detail()}
    with distributed.first_then_others():
        if not cache.intact(place):
            with cache.writing(place) as temporary:
                checkpoints.save(teacher, temporary)
                content = json.dumps(detail, indent=1, sort_keys=True)
                (temporary / "fit.json").write_text(content, encoding="utf-8")
    progress.note(f"fine-tuned teacher kept in the cache: {place}")
    return checkpoints.load(place, device=device), {**detail, "cached": False, "path": str(place)}


def outputs(
    teacher: Checkpoint,
    encoded: Encoded,
    *,
    device: torch.device,
    progress: Progress,
    graph: Path | None = None,
) -> np.ndarray:
    """Logits (N, C) of the teacher for every row, computed once and then read from disk.

    The result is memory-mapped, so its size does not count against memory. The key covers the teacher's
    files and the tokenised rows (not their labels, which the logits do not depend on).

    Args:
        teacher: In eval mode.
        encoded: Its rows.
        device: Where it is.
        progress: Observer.
        graph: Its float ONNX form, checked against it; used on a CPU, where it is faster than torch.
    """
    if device.type != "cpu":
        graph = None
    name = cache.key(
        format=_FORMAT,
        model=checkpoints.weights_digest(teacher.path),
        rows=text.fingerprint(Encoded(encoded.ids, encoded.type_ids, encoded.offsets, None)),
        device=device.type,
        runtime="torch" if graph is None else "onnxruntime",
    )
    path = cache.entry("outputs", f"{name}.npy")
    shape = (len(encoded), int(teacher.config.num_labels))
    with distributed.first_then_others():
        found = cache.load_array(path, shape=shape, mapped=True)
        if found is None:
            found = _store(teacher, encoded, path, progress, graph)
    return found


def _store(
    teacher: Checkpoint,
    encoded: Encoded,
    path: Path,
    progress: Progress,
    graph: Path | None,
) -> np.ndarray:
    teacher.model.eval()
    running: AbstractContextManager[Callable[[Mapping[str, np.ndarray]], np.ndarray]]
    if graph is None:
        running = nullcontext(torch_runner(teacher))
    else:
        running = sessions.running(graph, threads=torch.get_num_threads())
    size = max(1, _BATCH_TOKENS // max(1, int(encoded.lengths.mean())))
    # Texts of one length need no padding, which not every architecture ignores.
    plain = families.is_encoder(teacher.model_type)
    batches = (batching.inference_batches if plain else batching.equal_length_batches)(encoded.lengths, size)
    classes = int(teacher.config.num_labels)
    with (
        cache.filling(path, np.float32, (len(encoded), classes)) as logits,
        running as run,
        progress.task("teacher outputs", len(encoded)) as task,
    ):
        for rows in batches:
            logits[rows] = run(batching.collate(encoded, rows, teacher.pad_id))
            task.advance(len(rows))
    return logits
