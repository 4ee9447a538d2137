"""The teacher's signals of any training rows: read from disk where they fit, computed again where not.

Logits are always on disk. Hidden states are stored once, in half precision and memory-mapped, when all of them
fit the budget: N rows of T tokens, D features and k layers take N * T * D * k * 2 bytes. Otherwise the teacher
runs at every step, cut off at the highest layer that is read. Queries, keys and values are not stored: they
are one product away from the hidden states of the layer below.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcli import cache, families
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.inputs import batching, text
from kdcli.inputs.feeding import model_inputs, real
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task
from kdcli.training import distributed
from kdcli.training.capture import Capture, check_layers, run_cut, shape_of
from kdcli.training.loop import Batch
from kdcli.training.terms import Needs, Signals

_FORMAT = 1  # raise it when the same inputs would give other cached content
_BATCH_TOKENS = 4096
_SPARE_DISK = 2 << 30  # bytes that a cache leaves free


@dataclass(frozen=True)
class StatesPlace:
    """Where the teacher's hidden states come from, for the report."""

    how: str  # "not read", "on disk" or "recomputed"
    bytes: int


class TeacherSignals:
    """Gives the teacher's :class:`Signals` of a batch, padded as the student's.

    Args:
        teacher: In eval mode.
        encoded: The training rows, with the teacher's token ids.
        logits: (N, C), memory-mapped or not.
        needs: What the terms read besides logits.
        budget: Bytes that its hidden states may take on disk.
        device: Of teacher and student.
        progress: Observer.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        encoded: Encoded,
        logits: np.ndarray,
        needs: Needs,
        *,
        budget: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.teacher, self.encoded, self.logits, self.device = teacher, encoded, logits, device
        self.needs = needs
        self._layers: list[Layer] = []
        if families.is_encoder(teacher.model_type):
            self._layers = encoder_layers(teacher.model, teacher.family)
        self._states: dict[int, np.ndarray] = {}
        self._pooled: np.ndarray | None = None
        self._live: Capture | None = None
        self.stored = StatesPlace("not read", 0)
        if needs:
            self._prepare(budget, progress)

    def __call__(self, batch: Batch) -> Signals:
        """Signals of the batch's rows; logits (B, C) and the rest as :class:`Signals` says."""
        rows, width = batch.rows, batch.mask.shape[1]
        logits = torch.from_numpy(np.ascontiguousarray(self.logits[rows])).to(self.device)
        if self._live is not None:
            collated = batching.collate(self.encoded, rows, self.teacher.pad_id, width=width)
            self.teacher.model.eval()
            run_cut(self.teacher.model, model_inputs(self.teacher.model, collated, self.device))
            return self._live.signals(logits, batch.mask)
        states = {layer: self._padded(values, rows, batch.mask) for layer, values in self._states.items()}
        pooled = None
        if self._pooled is not None:
            pooled = torch.from_numpy(self._pooled[rows]).to(self.device).float()
        projected: list[dict[int, Tensor]] = []
        with torch.no_grad():
            for name in ("query", "key", "value"):
                projected.append(
                    {n: self._project(name, n, states[n - 1]) for n in sorted(self.needs.attention)}
                )
        hidden = {layer: states[layer] for layer in self.needs.hidden}
        return Signals(logits, batch.mask, pooled, hidden, *projected)

    def close(self) -> None:
        """Remove the hooks from the teacher."""
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def _project(self, name: str, number: int, below: Tensor) -> Tensor:
        layer = self._layers[number - 1]
        projected: Tensor = getattr(layer, name)(below)
        return projected.unflatten(-1, (-1, layer.head_size)).transpose(1, 2)

    def _padded(self, values: np.ndarray, rows: np.ndarray, mask: Tensor) -> Tensor:
        flat = torch.from_numpy(values[self.encoded.positions(rows)]).to(self.device).float()
        made = flat.new_zeros((*mask.shape, flat.shape[-1]))
        made[mask] = flat  # real tokens of a row stand in front, row after row, as in the flat array
        return made

    def _prepare(self, budget: int, progress: Progress) -> None:
        if self._layers:
            check_layers(self._layers, self.needs)
        wanted = sorted(self.needs.hidden | {n - 1 for n in self.needs.attention})
        width = shape_of(self.teacher).hidden
        layer_size = len(self.encoded.ids) * width * 2
        pooled_size = len(self.encoded) * width * 4
        size = len(wanted) * layer_size + pooled_size * self.needs.pooled
        place = cache.root()
        place.mkdir(parents=True, exist_ok=True)
        key = cache.key(
            format=_FORMAT,
            model=checkpoints.weights_digest(self.teacher.path),
            rows=text.fingerprint(
                Encoded(self.encoded.ids, self.encoded.type_ids, self.encoded.offsets, None)
            ),
            device=self.device.type,
        )
        folder = cache.entry("features", key)
        paths = {layer: folder / f"hidden-{layer}.npy" for layer in wanted}
        pooled = folder / "pooled.npy"
        states_of = (len(self.encoded.ids), width)
        with distributed.first_then_others():
            known = {n: cache.load_array(path, shape=states_of, mapped=True) for n, path in paths.items()}
            vectors = cache.load_array(pooled, mapped=True) if self.needs.pooled else None
            missing = Needs(
                self.needs.pooled and vectors is None,
                frozenset(n for n, values in known.items() if values is None),
            )
            more = len(missing.hidden) * layer_size + pooled_size * missing.pooled
            # What is stored already needs no room: a resumed run must read what the first one read.
            fits = size <= budget and more <= max(0, shutil.disk_usage(place).free - _SPARE_DISK)
            if missing and fits:
                made, made_vectors = self._store(missing, paths, pooled, progress, states_of)
                known |= made
                vectors = made_vectors if vectors is None else vectors
        if not fits:
            shown = f"{size / 2**30:.1f} GiB of hidden states do not fit the budget"
            progress.note(f"{shown}: the teacher runs at every step, up to the highest layer used")
            self._live = Capture(self.teacher, self.needs, cut=True)
            self.stored = StatesPlace("recomputed", 0)
            return
        self._states = {n: values for n, values in known.items() if values is not None}
        self._pooled = vectors
        self.stored = StatesPlace("on disk", size)

    def _store(
        self,
        missing: Needs,
        paths: dict[int, Path],
        pooled: Path,
        progress: Progress,
        shape: tuple[int, int],
    ) -> tuple[dict[int, np.ndarray], np.ndarray | None]:
        """Run the teacher once; the hidden states of every missing layer, and the pooled vectors if they were."""
        encoded, model = self.encoded, self.teacher.model
        vectors: np.ndarray | None = None
        batches = _by_tokens(encoded)
        model.eval()
        with contextlib.ExitStack() as stack:
            states = {
                n: stack.enter_context(cache.filling(paths[n], np.float16, shape))
                for n in sorted(missing.hidden)
            }
            capture = stack.enter_context(Capture(self.teacher, missing, cut=True))
            task = stack.enter_context(progress.task("teacher features", len(batches)))
            for rows in batches:
                collated = batching.collate(encoded, rows, self.teacher.pad_id)
                run_cut(model, model_inputs(model, collated, self.device))
                mask = real(collated, self.device)
                found = capture.signals(mask.new_zeros(()), mask)
                for layer, state in found.hidden.items():
                    states[layer][encoded.positions(rows)] = state[mask].half().cpu().numpy()
                if found.pooled is not None:
                    if vectors is None:
                        size = (len(encoded), found.pooled.shape[1])
                        vectors = stack.enter_context(cache.filling(pooled, np.float32, size))
                    vectors[rows] = found.pooled.float().cpu().numpy()
                task.advance()
        return states, vectors


def _by_tokens(encoded: Encoded) -> list[np.ndarray]:
    size = max(1, _BATCH_TOKENS // max(1, int(encoded.lengths.mean())))
    return batching.inference_batches(encoded.lengths, size)


def combined(
    logits: Sequence[np.ndarray],
    weights: Sequence[float],
    temperature: float,
    task: Task = CLASSIFICATION,
) -> np.ndarray:
    """Logits (N, C) of several teachers as one: their answers at T averaged, not their logits.

    For classes the result is T * log(sum_i w_i softmax(z_i / T)), so that its softmax at T is that average.
    """
    every = [torch.from_numpy(np.asarray(z, dtype=np.float64)) / temperature for z in logits]
    mean = temperature * task.combined(every, weights)
    return mean.numpy().astype(np.float32)
