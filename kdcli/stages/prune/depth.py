"""Whole encoder layers, and features of the residual stream between them: cut out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.context import Context
from kdcli.errors import InputError, UsageError
from kdcli.families import stack
from kdcli.families.layer import Layer
from kdcli.inputs.feeding import Labelled
from kdcli.models import transforms
from kdcli.models.transforms import Layers, Width
from kdcli.report.schema import Warning_
from kdcli.stages.prune import rows_read
from kdcli.stages.prune.budget import layer_macs, macs_at_width
from kdcli.stages.prune.criterion import LayerJob, WidthJob
from kdcli.stages.prune.options import PruneOptions

if TYPE_CHECKING:
    from kdcli.stages.prune.combined import State, StructurePart

STEP = 8
"""Features are cut in eights, the numbers that vector units and integer kernels work in."""


def shrink(context: Context, part: StructurePart, state: State) -> None:
    """Drop layers or cut features, in place, and write down what went."""
    if part.structure == "layers":
        _drop_layers(context, part, state)
    else:
        _narrow(context, part, state)


def _batches(context: Context, part: StructurePart) -> list[Labelled]:
    return rows_read.for_criterion(context, part.criterion, part.config)


def _drop_layers(context: Context, part: StructurePart, state: State) -> None:
    checkpoint = context.checkpoint
    model, family = checkpoint.model, checkpoint.family
    layers = stack.encoder_layers(model, family)
    have = len(layers)
    prices, remove = np.ones(have), 0.0
    if (count := part.config.keep_layers) is not None:
        if count > have:
            raise UsageError(f"--set keep_layers={count}: the model has {have} layers")
        remove = have - count
    elif part.budget is not None:
        prices = np.array([layer_macs(layer, state.tokens) for layer in layers])
        remove = float(prices.sum() - part.budget * state.dense)
        if remove > (prices.sum() - prices.min()) * (1 + 1e-9):
            raise UsageError(
                f"--budget {part.budget} cannot be met by dropping layers: one of {have} has to stay",
                "give a larger budget, or prune heads+neurons",
            )
    elif part.sparsity is not None:
        remove = min(round(part.sparsity * have), have - 1)
    batches = _batches(context, part)
    chosen = part.criterion.choose(
        LayerJob(model, family, prices, remove, batches, context.progress, checkpoint.task), part.config
    )
    if len(chosen.keep) < have:
        drop = Layers(keep=chosen.keep)
        transforms.apply(model, drop)
        checkpoint.log.transforms.append(drop)
    if part.budget is not None and (kept := float(prices[chosen.keep].sum())) > part.budget * state.dense * (
        1 + 1e-6
    ):
        text = (
            f"{kept / state.dense:.2%} of the encoder's multiply-accumulates are left: the last layer stays"
        )
        state.warnings.append(Warning_(code="budget-missed", message=text))
    left = [state.origin[i] for i in chosen.keep]
    context.progress.note(f"layers: {len(left)} of {have} stay: {', '.join(map(str, left))}")
    state.detail["layers"] = {
        "layers_before": have,
        "layers_after": len(chosen.keep),
        "kept": left,
        "rows": sum(len(labels) for _, labels in batches),
        "steps": chosen.trace,
        **chosen.detail,
    }
    state.origin = left


def _narrow(context: Context, part: StructurePart, state: State) -> None:
    checkpoint = context.checkpoint
    model, family = checkpoint.model, checkpoint.family
    have = stack.width_of(model, family)
    if have < STEP:
        raise InputError(f"the model's residual stream has {have} features, of which none can go")
    keep = _width(part, state, stack.encoder_layers(model, family), have)
    batches = _batches(context, part)
    chosen = part.criterion.narrow(WidthJob(model, family, keep, batches, context.progress), part.config)
    if keep < have:
        checkpoint.log.transforms.append(Width(keep=chosen.keep))
        options = context.request.options_as(PruneOptions)
        if not options.epochs:
            text = "a narrower residual stream changes every layer; train it with --epochs before judging it"
            state.warnings.append(Warning_(code="width-untrained", message=text))
    context.progress.note(f"width: {len(chosen.keep)} of {have} features stay")
    state.detail["width"] = {
        "width_before": have,
        "width_after": len(chosen.keep),
        "rows": sum(len(labels) for _, labels in batches),
        **chosen.detail,
    }


def _width(part: StructurePart, state: State, layers: list[Layer], have: int) -> int:
    """How many features stay."""
    if (width := part.config.width) is not None:
        if width > have:
            raise UsageError(f"--set width={width}: the model has {have} features")
        return int(width)
    if part.budget is None:
        assert part.sparsity is not None
        return have if not part.sparsity else max(STEP, STEP * round(have * (1 - part.sparsity) / STEP))
    limit = part.budget * state.dense * (1 + 1e-9)
    if part.budget >= 1 and macs_at_width(layers, state.tokens, have) <= limit:
        return have
    for width in range(have - have % STEP, 0, -STEP):
        if macs_at_width(layers, state.tokens, width) <= limit:
            return width
    least: Any = macs_at_width(layers, state.tokens, STEP) / state.dense
    raise UsageError(
        f"--budget {part.budget} cannot be met by width: with {STEP} features, {least:.1%} of the encoder's "
        "multiply-accumulates stay",
        "give a larger budget",
    )
