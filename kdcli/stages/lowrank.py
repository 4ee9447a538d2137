"""Low-rank: replace linear layers of the encoder by two thin factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor, nn

from kdcli import methods
from kdcli.data import batching
from kdcli.data.text import Encoded
from kdcli.errors import UsageError
from kdcli.methods import rank_budget
from kdcli.methods.lowrank.whitening import Moments, Spectrum
from kdcli.methods.rank_budget import Ranks, Size
from kdcli.models.families import encoder_linears
from kdcli.models.transforms import Factorise
from kdcli.report.schema import Method, Warning_
from kdcli.stages.base import LowRankOptions
from kdcli.stages.context import Applied, Context
from kdcli.stages.recovery import recover
from kdcli.training.batches import model_inputs

BUDGET = 0.6
"""Used when neither ``--budget``, ``--energy`` nor ``--rank`` is given."""

_BATCH_TOKENS = 4096
_HELD = 4  # one row in four of the calibration rows judges the shares of a budget
_GRADIENT_ROWS = 256


@dataclass
class _Plan:
    options: LowRankOptions
    module: Any
    config: Any
    layers: dict[str, nn.Linear]
    sizes: dict[str, Size]
    budget: float | None
    params: dict[str, Any]


def prepare(context: Context) -> None:
    """Refuse bad options and unknown architectures before anything is measured."""
    _plan(context)


def apply(context: Context) -> Applied:
    """Factorise the encoder of ``context`` in place, then train it back for ``--epochs``.

    ``--budget F`` keeps the share F of the parameters of all chosen layers together, ``--energy F`` in each
    layer the fewest directions with the share F of its output energy, ``--rank N`` N directions in each.

    Raises:
        UsageError: A bad option, a pattern that matches nothing, or a budget that cannot be met.
        InputError: kdcli cannot operate on this architecture.
    """
    plan = _plan(context)
    model, options, log = context.checkpoint.model, plan.options, context.checkpoint.log
    train = context.encoded["train"]
    rows = train.take(np.random.default_rng(context.seed).permutation(len(train))[: plan.config.samples])
    detail: dict[str, Any] = {"rows": len(rows), "tokens": int(rows.lengths.sum())}
    spectra, ranks = _decide(context, plan, rows, detail)
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    pairs: dict[str, nn.Module] = {n: plan.module.install(model, n, spectra[n], r) for n, r in kept.items()}
    _put(model, plan.layers)
    measured: dict[str, float] = {}
    if pairs:
        measured = plan.module.errors(model, plan.layers, pairs, spectra, _batches(context, rows, "errors"))
    _put(model, pairs)
    before = sum(size.dense for size in plan.sizes.values())
    after = rank_budget.total(plan.sizes, ranks)
    detail |= {"factorised": len(pairs), "parameters_before": before, "parameters_after": after}
    detail["parameters_kept"] = after / before if before else None
    warnings = []
    if pairs:
        log.transforms.append(Factorise(ranks=kept))
        if options.epochs:
            detail["recovery"] = recover(
                context, epochs=options.epochs, lr=options.lr, batch_size=options.batch_size
            )
    else:
        reason = (
            "no rank is below break-even" if plan.layers else "the encoder has no dense linear layer left"
        )
        text = f"nothing was factorised, the model is unchanged: {reason}"
        warnings.append(Warning_(code="nothing-factorised", message=text))
    table = [_row(n, plan.sizes[n], ranks[n], spectra[n], measured.get(n, 0.0)) for n in plan.layers]
    method = Method(name=options.method, params=plan.params, detail=detail, layers=table)
    return Applied(context.checkpoint, method, warnings=warnings)


def _plan(context: Context) -> _Plan:
    options = context.request.options
    assert isinstance(options, LowRankOptions)
    module = methods.load("lowrank", options.method)
    given = {k: v for k in ("budget", "energy", "rank") if (v := getattr(options, k)) is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join('--' + k for k in given)} exclude each other; give one of them")
    if options.budget is not None and not 0 < options.budget < 1:
        raise UsageError(f"--budget {options.budget} is outside (0, 1): it is the share of parameters kept")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UsageError(f"--energy {options.energy} is outside (0, 1]: it is the share of energy kept")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank {options.rank} is below 1")
    if options.epochs < 0:
        raise UsageError(f"--epochs {options.epochs} is negative; 0 means no recovery training")
    config = methods.parse_settings(module, context.request.common.settings)
    checkpoint = context.checkpoint
    layers = _chosen(encoder_linears(checkpoint.model, checkpoint.family), options)
    sizes = {name: rank_budget.size_of(layer) for name, layer in layers.items()}
    if not given:
        given = {"budget": BUDGET}
    budget = given.get("budget")
    if budget is not None:
        rank_budget.even(sizes, budget)  # raises when it cannot be met
    patterns = {"include": list(options.include), "exclude": list(options.exclude)}
    params = given | patterns | config.model_dump() | {"epochs": options.epochs}
    return _Plan(options, module, config, layers, sizes, budget, params)


def _chosen(layers: dict[str, nn.Linear], options: LowRankOptions) -> dict[str, nn.Linear]:
    """The layers that the patterns leave.

    Raises:
        UsageError: A pattern matches no layer, or no layer is left.
    """

    def matched(flag: str, patterns: Sequence[str]) -> set[str]:
        found = {pattern: {name for name in layers if fnmatchcase(name, pattern)} for pattern in patterns}
        for pattern, names in found.items():
            if not names:
                examples = ", ".join(list(layers)[:6]) or "none left, all layers are factorised or removed"
                raise UsageError(
                    f"{flag} '{pattern}' matches no dense linear layer of the encoder",
                    f"* stands for any characters; the names are such as {examples}",
                )
        return set().union(*found.values())

    kept = matched("--include", options.include or ("*",) * bool(layers))
    kept -= matched("--exclude", options.exclude)
    if layers and not kept:
        raise UsageError("--include and --exclude together leave no layer to factorise")
    return {name: layer for name, layer in layers.items() if name in kept}


def _decide(
    context: Context, plan: _Plan, rows: Encoded, detail: dict[str, Any]
) -> tuple[dict[str, Spectrum], Ranks]:
    """Collect statistics, decompose every layer and settle its rank."""
    model, options = context.checkpoint.model, plan.options
    moments: dict[str, Moments] = {}

    def collected(part: Encoded, title: str) -> tuple[dict[str, Spectrum], list[Tensor]]:
        logits = plan.module.collect(model, plan.layers, _batches(context, part, title), moments)
        return {n: plan.module.decompose(layer, moments[n]) for n, layer in plan.layers.items()}, logits

    if not plan.layers:
        return {}, {}
    if plan.budget is None:
        spectra, _ = collected(rows, "calibration")
        wanted = {n: options.rank or s.rank(options.energy or 1.0) for n, s in spectra.items()}
        return spectra, {n: plan.sizes[n].settle(rank) for n, rank in wanted.items()}
    held, fit = (rows.take(part) for part in np.split(np.arange(len(rows)), [max(1, len(rows) // _HELD)]))
    spectra, _ = collected(fit, "calibration")
    batches = _batches(context, fit.take(np.arange(min(_GRADIENT_ROWS, len(fit)))), "sensitivity")
    damage = rank_budget.predicted_damage(model, plan.layers, spectra, batches, context.seed)
    even = rank_budget.even(plan.sizes, plan.budget)
    weighed = rank_budget.by_damage(plan.sizes, damage, plan.budget)
    shares = {"even": even, "weighted": weighed, "between": rank_budget.between(plan.sizes, even, weighed)}
    # The held rows judge factors that never saw them; after that they join the statistics.
    final, dense = collected(held, "held rows")
    divergence: dict[str, float] = {}
    for name, ranks in shares.items():
        for layer, rank in ranks.items():
            if rank is not None:
                plan.module.install(model, layer, spectra[layer], rank)
        divergence[name] = rank_budget.divergence(model, dense, _batches(context, held, f"share: {name}"))
        _put(model, plan.layers)
    best = min(divergence, key=divergence.__getitem__)  # the first of equals, so the even one
    detail["allocation"] = {"chosen": best, "held_rows": len(held), "kl": divergence}
    return final, shares[best]


def _batches(context: Context, rows: Encoded, title: str) -> Iterator[dict[str, Tensor]]:
    size = max(1, _BATCH_TOKENS // int(rows.lengths.max()))
    batches = batching.inference_batches(rows.lengths, size)
    with context.progress.task(title, len(batches)) as task:
        for at in batches:
            batch = batching.collate(rows, at, context.checkpoint.pad_id)
            yield model_inputs(context.checkpoint.model, batch, context.device)
            task.advance()


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _row(name: str, size: Size, rank: int | None, spectrum: Spectrum, measured: float) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [size.outputs, size.inputs],
        "rank": rank,
        "break_even": size.break_even,
        "parameters_before": size.dense,
        "parameters_after": size.parameters(rank),
        "error_predicted": 0.0 if rank is None else spectrum.error(rank),
        "error_measured": measured,
        "kept_dense": rank is None,
    }
