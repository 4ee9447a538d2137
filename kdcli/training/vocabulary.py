"""What the teacher knows about single tokens, computed once: their vectors and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kdcli import cache
from kdcli.models import checkpoint as checkpoints
from kdcli.models import inits, neighbours
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.training import distributed

_FORMAT = 1  # raise it when the same teacher would give other cached content


def token_vectors(teacher: Checkpoint, progress: Progress) -> Tensor:
    """:func:`kdcli.models.inits.token_vectors` of the teacher, (V, D) on the CPU."""

    def make() -> np.ndarray:
        progress.note("reading every token of the vocabulary alone (once; the result is cached)")
        found: np.ndarray = inits.token_vectors(teacher).cpu().numpy()
        return found

    return torch.from_numpy(np.array(_cached("token-vectors", teacher, make)))


def near_tokens(teacher: Checkpoint, k: int, progress: Progress) -> np.ndarray:
    """The ``k`` tokens nearest to each token in the teacher's eyes, int32 (V, k)."""

    def make() -> np.ndarray:
        tokenizer = teacher.tokenizer
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        groups = neighbours.token_groups(vocabulary, set(tokenizer.all_special_ids))
        vectors = token_vectors(teacher, progress)
        table = vectors[: len(vocabulary)].to(teacher.device)
        found = neighbours.nearest(table, k, groups)
        # Rows of the table that no token has stand for themselves.
        rest = np.repeat(np.arange(len(vocabulary), len(vectors), dtype=np.int32)[:, None], k, axis=1)
        return np.concatenate([found, rest])

    return _cached(f"near-{k}", teacher, make)


def _cached(kind: str, teacher: Checkpoint, make: Callable[[], np.ndarray]) -> np.ndarray:
    key = cache.key(format=_FORMAT, model=checkpoints.weights_digest(teacher.path))
    path = cache.entry("vocabulary", f"{kind}-{key}.npy")
    with distributed.first_then_others():
        found = cache.load_array(path, mapped=True)
        if found is None:
            found = make()
            cache.save_array(path, found)
    return found
