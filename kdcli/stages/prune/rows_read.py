"""The training rows that a method of pruning looks at."""

from __future__ import annotations

from typing import Any

import torch

from kdcli.context import Context
from kdcli.inputs import batching, sampling
from kdcli.inputs.feeding import Labelled, model_inputs
from kdcli.stages.prune.criterion import Criterion


def for_criterion(context: Context, criterion: Criterion, config: Any) -> list[Labelled]:
    """The batches that a method's settings ask for; none for a method that reads no rows."""
    return batches(context, config.samples, config.batch_size) if criterion.reads_rows else []


def batches(context: Context, samples: int, batch_size: int) -> list[Labelled]:
    """Inputs and labels of some training rows, by length; a row without a label gets the model's own answer."""
    model, train, task = context.checkpoint.model, context.encoded["train"], context.checkpoint.task
    sample = sampling.sample(train, samples, context.seed, task)
    labels = sample.labels
    if labels is None:
        labels = task.unlabelled(len(sample), len(context.checkpoint.labels))
    known = task.known(labels)
    made: list[Labelled] = []
    for at in batching.inference_batches(sample.lengths, batch_size):
        inputs = model_inputs(model, batching.collate(sample, at, context.checkpoint.pad_id), context.device)
        targets = torch.from_numpy(labels[at]).to(context.device)
        if not known[at].all():
            with torch.no_grad():
                own = task.own(model(**inputs).logits)
            targets[~known[at]] = own[~known[at]]
        made.append((inputs, targets))
    return made
