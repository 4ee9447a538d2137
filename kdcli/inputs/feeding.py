"""From numpy batches to model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import families
from kdcli.input_names import SEGMENTS
from kdcli.inputs import kinds
from kdcli.inputs.text import TEXT
from kdcli.models.checkpoint import Checkpoint

Labelled = tuple[Mapping[str, Tensor], Tensor]
"""Model inputs, and labels (B,): the rows' own, or the model's answer where a row has none."""


class HandsOn(nn.Module):
    """A module that hands what it is given on to others, each of which takes its part by :func:`taken`."""


@lru_cache(maxsize=64)
def _accepts(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepted(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that a model takes."""
    kind: Any = type(model)
    names = frozenset(TEXT.names) if isinstance(model, HandsOn) else _accepts(kind)
    # A model with one segment or none would look segment ids up in a table that is too small. One that does not say
    # how many it has (XLNet) has no table of them.
    config: Any = model.config
    segments = getattr(config, "type_vocab_size", families.presumed(str(config.model_type)).segments)
    return names if segments is None or int(segments or 0) >= 2 else names - {SEGMENTS}


def taken(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the arguments a model takes."""
    names = accepted(model)
    return {name: value for name, value in given.items() if name in names}


def real(batch: Mapping[str, np.ndarray], device: torch.device | str) -> Tensor:
    """(B, T) bool on a device: which tokens of a collated batch are no padding."""
    return torch.from_numpy(kinds.mask(batch)).to(device).bool()


def model_inputs(
    model: nn.Module, batch: Mapping[str, np.ndarray], device: torch.device | str
) -> dict[str, Tensor]:
    """Turn a collated batch into the keyword arguments that ``model`` takes.

    Args:
        model: A transformers model.
        batch: As :func:`kdcli.inputs.batching.collate` makes it.
        device: Where the tensors go.

    Returns:
        The entries the model accepts.
    """
    names = accepted(model)
    return {k: torch.from_numpy(v).to(device) for k, v in batch.items() if k in names}


def torch_runner(checkpoint: Checkpoint) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A function from a batch to the checkpoint's own logits (B, C)."""

    @torch.inference_mode()
    def run(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        output = checkpoint.model(**model_inputs(checkpoint.model, batch, checkpoint.device))
        logits: np.ndarray = output.logits.float().cpu().numpy()
        return logits

    return run
