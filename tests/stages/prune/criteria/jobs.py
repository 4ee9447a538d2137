"""Jobs over tiny models, for methods that set weights to zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdcli.families.modules import projections
from kdcli.families.stack import encoder_layers
from kdcli.inputs.feeding import Labelled
from kdcli.models.checkpoint import Checkpoint
from kdcli.stages.prune.criterion import Pattern, WeightJob
from tests import tiny

LABELS = torch.tensor([0, 1, 1, 0, 1])


def weight_job(made: Checkpoint, pattern: Pattern, batches: Sequence[Labelled] | None = None) -> WeightJob:
    """All matrices of the encoder; five sentences in one padded batch unless others are given."""
    prefix = made.family.layers + "."
    matrices = {n: layer for n, layer in projections(made.model).items() if n.startswith(prefix)}
    layers = encoder_layers(made.model, made.family)
    batches = [(tiny.batch(made.model_type), LABELS)] if batches is None else batches
    return WeightJob(made.model, layers, matrices, pattern, batches)


def singly(batch: dict[str, torch.Tensor]) -> list[Labelled]:
    """The rows of a padded batch, one batch each, without their padding."""
    widths = batch["attention_mask"].sum(1).tolist()
    return [
        ({k: v[i : i + 1, :width] for k, v in batch.items()}, LABELS[i : i + 1])
        for i, width in enumerate(widths)
    ]


def padded(batch: dict[str, torch.Tensor], more: int, pad_id: int) -> list[Labelled]:
    """The batch with ``more`` tokens of padding at the end of every row."""
    rows = len(batch["input_ids"])
    ids = torch.full((rows, more), pad_id)
    wide = {
        "input_ids": torch.cat([batch["input_ids"], ids], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(ids)], 1),
    }
    return [(wide, LABELS)]
