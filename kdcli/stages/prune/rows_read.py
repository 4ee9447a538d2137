"""The training rows that a method of pruning looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kdcli.context import Context
from kdcli.inputs import batching, sampling
from kdcli.inputs.feeding import Labelled, model_inputs
from kdcli.stages.prune.criterion import Criterion
from kdcli.training.cross_entropy import UNLABELLED


def of(context: Context, criterion: Criterion, config: Any) -> list[Labelled]:
    """The batches that a method's settings ask for; none for a method that reads no rows."""
    return batches(context, config.samples, config.batch_size) if criterion.reads_rows else []


def batches(context: Context, samples: int, batch_size: int) -> list[Labelled]:
    """Inputs and labels of some training rows, by length; a row without a label gets the model's own answer."""
    model, train = context.checkpoint.model, context.encoded["train"]
    sample = sampling.sample(train, samples, context.seed)
    labels = np.full(len(sample), UNLABELLED, dtype=np.int64) if sample.labels is None else sample.labels
    made: list[Labelled] = []
    for at in batching.inference_batches(sample.lengths, batch_size):
        inputs = model_inputs(model, batching.collate(sample, at, context.checkpoint.pad_id), context.device)
        targets = torch.from_numpy(labels[at]).to(context.device)
        if (labels[at] < 0).any():
            with torch.no_grad():
                own = model(**inputs).logits.argmax(1)
            targets = torch.where(targets < 0, own, targets)
        made.append((inputs, targets))
    return made
