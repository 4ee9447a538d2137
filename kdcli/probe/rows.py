"""Rows of the data as batches for a model, for statistics and trials."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.context import Context
from kdcli.inputs import batching, sampling
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import Encoded

MOST_TOKENS = 16384
"""Of a calibration: ten for every feature of a wide encoder, which is enough for its covariances."""

_BATCH_TOKENS = 1024


def sample(context: Context, count: int) -> Encoded:
    """Training rows, drawn by the seed: ``count`` of them, fewer where their texts are long.

    Every beginning of them is a sample like the whole, so a part of them may be taken from the front.
    """
    train = context.encoded["train"]
    order = sampling.order(sampling.strata(train, context.checkpoint.task), len(train), context.seed)[:count]
    fitting = int(np.searchsorted(np.cumsum(train.lengths[order]), MOST_TOKENS, side="right"))
    return train.take(order[: max(1, fitting)])


def indexed(context: Context, rows: Encoded) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
    """(row numbers, inputs) of every batch, rows of like length together."""
    if not len(rows):
        return []
    size = max(1, _BATCH_TOKENS // int(rows.lengths.max()))
    model, pad = context.checkpoint.model, context.checkpoint.pad_id
    return [
        (at, model_inputs(model, batching.collate(rows, at, pad), context.device))
        for at in batching.inference_batches(rows.lengths, size)
    ]


def batches(context: Context, rows: Encoded) -> list[dict[str, Tensor]]:
    """Inputs of every batch."""
    return [batch for _, batch in indexed(context, rows)]


@torch.no_grad()
def targets(context: Context, rows: Encoded, at: np.ndarray, inputs: Mapping[str, Tensor]) -> Tensor:
    """Labels of the B rows ``at`` of some rows; one without a label gets the model's own answer.

    Args:
        context: The model and its task.
        rows: That the batch is of.
        at: (B,) positions.
        inputs: The batch.
    """
    task, labels = context.checkpoint.task, rows.labels
    if labels is None:
        labels = task.unlabelled(len(rows), len(context.checkpoint.labels))
    found = torch.from_numpy(labels[at]).to(context.device)
    unknown = ~task.known(labels[at])
    if unknown.any():
        found[unknown] = task.own(context.checkpoint.model(**inputs).logits)[unknown]
    return found


@torch.no_grad()
def logits(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """Logits (B, C) of every batch."""
    return [model(**batch).logits for batch in inputs]


@torch.no_grad()
def score(context: Context, rows: Encoded) -> float:
    """What the task chooses models by, of the model as it is now, on rows with labels."""
    assert rows.labels is not None
    found = np.empty((len(rows), len(context.checkpoint.labels)), dtype=np.float32)
    for at, batch in indexed(context, rows):
        found[at] = context.checkpoint.model(**batch).logits.float().cpu().numpy()
    return context.checkpoint.task.selection_score(found, rows.labels, rows.queries)


def unpadded(context: Context, rows: Encoded) -> list[dict[str, Tensor]]:
    """Batches of rows of one length each, for layers that see no mask."""
    model, pad = context.checkpoint.model, context.checkpoint.pad_id
    return [
        model_inputs(model, batching.collate(rows, at, pad), context.device)
        for at in batching.equal_length_batches(rows.lengths, 256)
    ]
