"""From numpy batches to model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@lru_cache(maxsize=64)
def _accepts(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def model_inputs(
    model: nn.Module, batch: Mapping[str, np.ndarray], device: torch.device | str
) -> dict[str, Tensor]:
    """Turn a collated batch into the keyword arguments that ``model`` takes.

    Args:
        model: A transformers model, possibly wrapped for distributed training.
        batch: ``input_ids``, ``attention_mask`` and ``token_type_ids``, each (B, T) int64.
        device: Where the tensors go.

    Returns:
        The entries the model accepts. Segment ids are left out when there is one segment or none,
        because such a model would look them up in a table that is too small.
    """
    inner: Any = getattr(model, "module", model)
    kind: Any = type(inner)
    names = _accepts(kind)
    if int(getattr(inner.config, "type_vocab_size", 0) or 0) < 2:
        names = names - {"token_type_ids"}
    return {k: torch.from_numpy(v).to(device) for k, v in batch.items() if k in names}
