"""What is computed once about a teacher: its fine-tuning on the task, and its outputs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import cache
from kdcli.data import batching, text
from kdcli.data.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.training.batches import model_inputs
from kdcli.training.loop import FitOptions, fit
from kdcli.training.losses import cross_entropy
from kdcli.training.resume import ResumePoint

_FORMAT = 1  # raise it when the same inputs would give other cached content
_BATCH_TOKENS = 4096


def fine_tuned(
    teacher: Checkpoint,
    encoded: Mapping[str, Encoded],
    options: FitOptions,
    *,
    device: torch.device,
    progress: Progress,
    resume_dir: Path,
    resuming: bool,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Fine-tune a teacher that has no head for the task, or take it from the cache.

    The cache key covers the teacher's files, the tokenised rows with their labels, the label names and
    the options, so that nothing else can be mistaken for it.

    Args:
        teacher: Its head is new; ``labels`` are the task's. It is trained in place.
        encoded: ``train`` and ``validation``; rows labelled -100 take no part.
        options: How to train.

    Returns:
        The fine-tuned teacher, loaded from the cache, and what was done, for the report.
    """
    name = cache.key(
        format=_FORMAT,
        model=checkpoints.weights_digest(teacher.path),
        train=text.fingerprint(encoded["train"]),
        validation=text.fingerprint(encoded["validation"]),
        labels=teacher.labels,
        options=asdict(options),
        device=device.type,
    )
    place = cache.entry("teachers", name)
    facts = place / "fit.json"
    if facts.exists():
        detail = json.loads(facts.read_text(encoding="utf-8"))
        progress.note(f"fine-tuned teacher from the cache: {place}")
        return checkpoints.load(place, device=device), {**detail, "cached": True, "path": str(place)}
    progress.note("the teacher has no head for this task: fine-tuning it first (once; the result is cached)")
    train = encoded["train"]
    assert train.labels is not None
    train = train.take(np.flatnonzero(train.labels >= 0))
    assert train.labels is not None
    result = fit(
        teacher.model,
        train,
        encoded["validation"],
        cross_entropy(train.labels, device),
        options,
        pad_id=teacher.pad_id,
        device=device,
        progress=progress,
        title="fine-tuning the teacher",
        resume=ResumePoint(resume_dir / "teacher", {"teacher": name}),
        resuming=resuming,
    )
    teacher.has_head = True
    detail = {"fine_tuned": True, "key": name, **result.detail()}
    with cache.writing(place) as temporary:
        checkpoints.save(teacher, temporary)
        (temporary / "fit.json").write_text(json.dumps(detail, indent=1, sort_keys=True), encoding="utf-8")
    progress.note(f"fine-tuned teacher kept in the cache: {place}")
    return checkpoints.load(place, device=device), {**detail, "cached": False, "path": str(place)}


def outputs(teacher: Checkpoint, encoded: Encoded, *, device: torch.device, progress: Progress) -> np.ndarray:
    """Logits (N, C) of the teacher for every row, computed once and then read from disk.

    The result is memory-mapped, so its size does not count against memory. The key covers the teacher's
    files and the tokenised rows (not their labels, which the logits do not depend on).
    """
    name = cache.key(
        format=_FORMAT,
        model=checkpoints.weights_digest(teacher.path),
        rows=text.fingerprint(Encoded(encoded.ids, encoded.type_ids, encoded.offsets, None)),
        device=device.type,
    )
    path = cache.entry("outputs", f"{name}.npy")
    if path.exists():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = max(1, _BATCH_TOKENS // max(1, int(encoded.lengths.mean())))
    batches = batching.inference_batches(encoded.lengths, size)
    classes = int(teacher.config.num_labels)
    handle, temporary = tempfile.mkstemp(prefix=".outputs-", suffix=".npy", dir=path.parent)
    os.close(handle)
    try:
        logits = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.float32, shape=(len(encoded), classes)
        )
        teacher.model.eval()
        with torch.inference_mode(), progress.task("teacher outputs", len(batches)) as task:
            for rows in batches:
                batch = batching.collate(encoded, rows, teacher.pad_id)
                logits[rows] = (
                    teacher.model(**model_inputs(teacher.model, batch, device)).logits.float().cpu().numpy()
                )
                task.advance()
        logits.flush()
        del logits
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return np.load(path, mmap_mode="r", allow_pickle=False)
