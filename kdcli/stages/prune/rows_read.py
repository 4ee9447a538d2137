"""The training rows that a method of pruning looks at."""

from __future__ import annotations

from typing import Any

from kdcli.context import Context
from kdcli.inputs import batching, sampling
from kdcli.inputs.feeding import Labelled, model_inputs
from kdcli.probe import rows
from kdcli.stages.prune.criterion import Criterion


def for_criterion(context: Context, criterion: Criterion, config: Any) -> list[Labelled]:
    """The batches that a method's settings ask for; none for a method that reads no rows."""
    return batches(context, config.samples, config.batch_size) if criterion.reads_rows else []


def batches(context: Context, samples: int, batch_size: int) -> list[Labelled]:
    """Inputs and labels of some training rows, by length; a row without a label gets the model's own answer."""
    model, pad = context.checkpoint.model, context.checkpoint.pad_id
    sample = sampling.sample(context.encoded["train"], samples, context.seed, context.checkpoint.task)
    made: list[Labelled] = []
    for at in batching.inference_batches(sample.lengths, batch_size):
        inputs = model_inputs(model, batching.collate(sample, at, pad), context.device)
        made.append((inputs, rows.targets(context, sample, at, inputs)))
    return made
