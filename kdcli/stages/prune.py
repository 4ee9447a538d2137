"""Prune: take whole heads and neurons out of the encoder, or set single weights of it to zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcli import methods
from kdcli.data import batching
from kdcli.errors import InputError, UsageError, did_you_mean
from kdcli.methods.prune.taylor import Batch
from kdcli.methods.prune_budget import layer_macs, macs_to_remove, search, table_row
from kdcli.models.families import encoder_layers
from kdcli.models.layers import projections
from kdcli.models.transforms import Zero
from kdcli.report.schema import Method, Warning_
from kdcli.stages.base import STRUCTURES, PruneOptions
from kdcli.stages.context import Applied, Context
from kdcli.stages.recovery import recover
from kdcli.training.batches import model_inputs
from kdcli.training.losses import UNLABELLED

SPARSITY = 0.3
"""Used when neither ``--sparsity`` nor ``--budget`` is given."""

SCHEDULES = ("iterative", "one-shot")

_ZEROS = (
    "zeros make nothing smaller or faster: model.safetensors and model.onnx keep their size, and every zero "
    "is still multiplied; only a compressed archive shrinks (--structure heads+neurons really removes parts)"
)


@dataclass
class _Plan:
    options: PruneOptions
    name: str
    module: Any
    config: Any
    sparsity: float | None  # None: options.budget counts
    params: dict[str, Any]
    training: dict[str, Any]


def prepare(context: Context) -> None:
    """Refuse bad options and unknown architectures before anything is measured."""
    _plan(context)


def apply(context: Context) -> Applied:
    """Prune the model of ``context`` in place, then train it back for ``--epochs``.

    ``--sparsity F`` removes the share F of what the structure can remove: of the multiply-accumulates of
    the encoder's heads, of its neurons, or of both together, for a row of the training data's mean length;
    of the number of weights in the encoder's matrices for the structure ``weights``. ``--budget F`` keeps
    the share F of all multiply-accumulates of the encoder. Both refer to the model as it comes in.

    Raises:
        UsageError: A bad option, or a budget that the structure cannot meet.
        InputError: kdcli cannot operate on this architecture, or there is nothing left to prune.
    """
    plan = _plan(context)
    return _weights(context, plan) if plan.options.structure == "weights" else _units(context, plan)


def _plan(context: Context) -> _Plan:
    options = context.request.options
    assert isinstance(options, PruneOptions)
    structure = options.structure
    if structure not in STRUCTURES:
        raise UsageError(f"unknown structure '{structure}': {did_you_mean(structure, STRUCTURES)}")
    if (schedule := options.schedule) not in SCHEDULES:
        raise UsageError(f"unknown schedule '{schedule}': {did_you_mean(schedule, SCHEDULES)}")
    name = options.method or STRUCTURES[structure]
    module = methods.load("prune", name)
    if name != STRUCTURES[structure]:
        raise UsageError(f"--method {name} does not prune {structure}; use --method {STRUCTURES[structure]}")
    if options.sparsity is not None and options.budget is not None:
        raise UsageError("--sparsity and --budget say the same thing in two ways; give one of them")
    if options.sparsity is not None and not 0 <= options.sparsity < 1:
        raise UsageError(f"--sparsity {options.sparsity} is outside [0, 1): it is the share that is removed")
    if options.budget is not None and not 0 < options.budget <= 1:
        raise UsageError(f"--budget {options.budget} is outside (0, 1]: it is the share that is kept")
    if options.budget is not None and structure == "weights":
        raise UsageError(
            "--budget is a share of multiply-accumulates, and zeroing weights removes none of them",
            "give --sparsity, or choose --structure heads+neurons",
        )
    if options.epochs < 0:
        raise UsageError(f"--epochs {options.epochs} is negative; 0 means no recovery training")
    config = methods.parse_settings(module, context.request.common.settings)
    assert context.checkpoint.family  # raises for an architecture that kdcli cannot operate on
    params: dict[str, Any] = {"structure": structure}
    sparsity = None
    if options.budget is not None:
        params |= {"budget": options.budget, "budget_of": "multiply-accumulates of the encoder"}
    else:
        sparsity = SPARSITY if options.sparsity is None else options.sparsity
        of = "encoder weights" if structure == "weights" else f"multiply-accumulates of the {structure}"
        params |= {"sparsity": sparsity, "sparsity_of": of}
    if structure != "weights":  # magnitudes do not change while they are cut: both schedules are the same
        params["schedule"] = schedule
    params |= config.model_dump() | {"epochs": options.epochs}
    training = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    return _Plan(options, name, module, config, sparsity, params, training)


def _weights(context: Context, plan: _Plan) -> Applied:
    checkpoint = context.checkpoint
    prefix = checkpoint.family.layers + "."
    found = projections(checkpoint.model).items()
    weights = {f"{name}.weight": layer.weight for name, layer in found if name.startswith(prefix)}
    if not weights:
        raise InputError("the model's encoder has no weights left to prune")
    assert plan.sparsity is not None
    gone = {name: ~kept for name, kept in plan.module.masks(weights, plan.sparsity, plan.config).items()}

    def zero() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(gone[name], 0.0)

    zero()
    detail: dict[str, Any] = {"note": _ZEROS}
    if plan.options.epochs:
        detail["recovery"] = recover(context, **plan.training, after_step=zero)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    checkpoint.log.transforms.append(Zero(sparsity=plan.sparsity, tensors=zeros))
    total, gone_now = sum(w.numel() for w in weights.values()), sum(zeros.values())
    detail |= {"weights": total, "zeros": gone_now, "zero_share": gone_now / total}
    table = []
    for layer in encoder_layers(checkpoint.model, checkpoint.family):
        own = [x.weight for x in projections(layer.module).values()]
        counts = {"weights": sum(w.numel() for w in own), "zeros": sum(int((w == 0).sum()) for w in own)}
        table.append({"layer": layer.index, **counts})
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=[Warning_(code="zeros-not-smaller", message=_ZEROS)])


def _units(context: Context, plan: _Plan) -> Applied:
    checkpoint, options = context.checkpoint, plan.options
    model, layers = checkpoint.model, encoder_layers(checkpoint.model, checkpoint.family)
    tokens = float(context.encoded["train"].lengths.mean())
    table = [table_row(layer, tokens, "before") for layer in layers]
    dense = sum(layer_macs(layer, tokens) for layer in layers)
    remove = macs_to_remove(layers, options.structure, tokens, sparsity=plan.sparsity, budget=options.budget)
    steps = plan.config.steps if options.schedule == "iterative" else 1
    batches = _batches(context, plan)
    with context.progress.task("importance", steps * len(batches)) as task:

        def counted() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                task.advance()

        cut, trace = search(
            model,
            layers,
            lambda: plan.module.importance(model, layers, counted(), plan.config.score),
            structure=options.structure,
            remove=remove,
            steps=steps,
            tokens=tokens,
        )
    if cut.heads or cut.neurons:
        checkpoint.log.transforms.append(cut)
    left = sum(layer_macs(layer, tokens) for layer in layers)
    detail: dict[str, Any] = {
        "sequence": tokens,
        "rows": sum(len(labels) for _, labels in batches),
        "encoder_macs_before": round(dense),
        "encoder_macs_after": round(left),
        "encoder_macs_kept": left / dense,
        "steps": trace,
    }
    warnings = []
    if left > (dense - remove) * (1 + 1e-6):
        share, asked = left / dense, 1 - remove / dense
        text = f"{share:.2%} of the encoder's multiply-accumulates are left where {asked:.2%} was asked for"
        warnings.append(
            Warning_(code="budget-missed", message=f"{text}: the last head and the last neuron stay")
        )
    if options.epochs:
        detail["recovery"] = recover(context, **plan.training)
    table = [row | table_row(layer, tokens, "after") for row, layer in zip(table, layers, strict=True)]
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=warnings)


def _batches(context: Context, plan: _Plan) -> list[Batch]:
    """Inputs and labels of the sampled training rows; a row without a label gets the model's own answer."""
    model, train = context.checkpoint.model, context.encoded["train"]
    count = min(plan.config.samples, len(train))
    rows = np.sort(np.random.default_rng(context.seed).choice(len(train), count, replace=False))
    sample = train.take(rows)
    labels = np.full(count, UNLABELLED, dtype=np.int64) if sample.labels is None else sample.labels
    made: list[Batch] = []
    for at in batching.inference_batches(sample.lengths, plan.config.batch_size):
        inputs = model_inputs(model, batching.collate(sample, at, context.checkpoint.pad_id), context.device)
        targets = torch.from_numpy(labels[at]).to(context.device)
        if (labels[at] < 0).any():
            with torch.no_grad():
                own = model(**inputs).logits.argmax(1)
            targets = torch.where(targets < 0, own, targets)
        made.append((inputs, targets))
    return made
