"""What tests of the methods that refit have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kdcli.methods.prune_budget import costs
from kdcli.methods.pruning import Batch, UnitJob
from kdcli.models.families import encoder_layers
from tests import tiny

TOKENS = 9.0


def batches(family: str = "bert", rows: int = 512, seed: int = 0) -> list[Batch]:
    """Random sentences, some of them padded, in two batches."""
    made = tiny.checkpoint(family)
    rng = torch.Generator().manual_seed(seed)
    length = 10
    ids = torch.randint(5, len(made.tokenizer), (rows, length), generator=rng)
    ids[:, 0] = made.tokenizer.cls_token_id
    mask = torch.arange(length)[None, :] < torch.randint(4, length + 1, (rows, 1), generator=rng)
    ids[~mask] = made.tokenizer.pad_token_id
    labels = torch.randint(0, 2, (rows,), generator=rng)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return [({k: v[at] for k, v in inputs.items()}, labels[at]) for at in torch.arange(rows).chunk(2)]


def job_of(made: Any, structure: str, share: float, rows: list[Batch] | None = None) -> UnitJob:
    """Remove ``share`` of what the units of the structure cost."""
    layers = encoder_layers(made.model, made.family)
    whole = float(costs(layers, TOKENS).only(structure).flat().sum())
    return UnitJob(
        made.model,
        layers,
        structure,
        lambda now: costs(now, TOKENS),
        share * whole,
        batches(made.family.name) if rows is None else rows,
    )


def divergence(dense: Any, made: Any, rows: list[Batch]) -> float:
    """KL(dense || pruned) in nats, mean over the rows."""
    with torch.no_grad():
        pairs = [
            (dense.model(**x).logits.log_softmax(-1), made.model(**x).logits.log_softmax(-1)) for x, _ in rows
        ]
    total = sum(float(F.kl_div(now, before, log_target=True, reduction="sum")) for before, now in pairs)
    return total / sum(len(labels) for _, labels in rows)


def doubled(seed: int = 0) -> Any:
    """A model in which neuron 2 i + 1 does the same as neuron 2 i, and head 2 i + 1 the same as head 2 i."""
    made = tiny.checkpoint(seed=seed)
    with torch.no_grad():
        for layer in encoder_layers(made.model, made.family):
            for projection, width in (
                *((p, layer.head_size) for p in (layer.query, layer.key, layer.value)),
                (layer.ffn_in, 1),
            ):
                units = projection.weight.unflatten(0, (-1, 2, width))
                units[:, 1] = units[:, 0]
                biases = projection.bias.unflatten(0, (-1, 2, width))
                biases[:, 1] = biases[:, 0]
    return made


def kept_of(found: Any, made: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Kept heads and neurons of every layer by the cut."""
    return (
        [np.array(found.cut.heads.get(i, range(4))) for i in range(2)],
        [np.array(found.cut.neurons.get(i, range(48))) for i in range(2)],
    )
