"""What tests of the methods that refit have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdcli.families.stack import encoder_layers
from kdcli.inputs.feeding import Labelled
from kdcli.models import transforms
from kdcli.stages.prune.budget import costs, layer_macs
from kdcli.stages.prune.criteria import taylor
from kdcli.stages.prune.criterion import UnitJob, UnitsCut
from tests import tiny

TOKENS = 9.0


def batches(family: str = "bert", rows: int = 512, seed: int = 0) -> list[Labelled]:
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


def job_of(made: Any, structure: str, share: float, rows: list[Labelled] | None = None) -> UnitJob:
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


def divergence(dense: Any, made: Any, rows: list[Labelled]) -> float:
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


def halves_and_beats_taylor(family: str, prune: Callable[[UnitJob], UnitsCut]) -> None:
    """Half of the cost goes, the cut rebuilds the shapes, and the answers move less than by Taylor importance."""
    dense, made, other = (tiny.checkpoint(family) for _ in range(3))
    job = job_of(made, "heads+neurons", 0.5)
    whole = sum(layer_macs(layer, TOKENS) for layer in job.layers)
    found = prune(job)
    left = sum(layer_macs(layer, TOKENS) for layer in job.layers)
    assert 0.4 * whole < left <= 0.5 * whole * (1 + 1e-9)
    # The cut alone rebuilds the shapes on a fresh model, which the weights then fit.
    fresh = tiny.checkpoint(family)
    transforms.apply(fresh.model, found.cut)
    fresh.model.load_state_dict(made.model.state_dict())
    rows = batches(family, seed=5)
    assert divergence(made, fresh, rows) < 1e-9
    taylor.prune(job_of(other, "heads+neurons", 0.5), taylor.Config(samples=64))
    assert divergence(dense, made, rows) < divergence(dense, other, rows)
