"""Low-rank: replace matrices of the model by two thin factors, convolutions by chains of smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdcli import processes, registry
from kdcli.context import Applied, Context, Stage
from kdcli.errors import UsageError
from kdcli.families.family import Encoder
from kdcli.families.stack import encoder_linears
from kdcli.foresight import STATISTICS_ROWS, Foreseen, Sizes
from kdcli.models.transforms import Factorise
from kdcli.probe import speedup
from kdcli.report.schema import Method, Warning_
from kdcli.request import Request
from kdcli.stages.lowrank import convolutions, merging, rank_budget
from kdcli.stages.lowrank.factor_units import FactorUnit, unit_of
from kdcli.stages.lowrank.matrices import Work
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.lowrank.patterns import patterns_leave
from kdcli.stages.lowrank.rule import ConvolutionRule, LinearRule
from kdcli.training.recovery import recover

BUDGET = 0.6
"""Used when nothing else says how much is kept."""

EMBEDDINGS = "embeddings"
"""What ``--include`` calls the table of the tokens."""

AMOUNTS = ("budget", "energy", "rank", "target_speedup")


@dataclass
class LowRankPlan:
    options: LowRankOptions
    rule: LinearRule | ConvolutionRule
    config: Any
    amount: dict[str, Any]  # one of AMOUNTS, or max_drop
    params: dict[str, Any]
    units: dict[str, FactorUnit]


def prepare(context: Context) -> LowRankPlan:
    """Refuse bad options and unknown architectures before anything is measured."""
    return _plan(context)


def apply(context: Context, plan: LowRankPlan) -> Applied:
    """Factorise the model of ``context`` in place, then train it back for ``--epochs``.

    ``--budget F`` keeps the share F of the parameters of all chosen layers together, ``--energy F`` in each
    layer the fewest directions with the share F of what the method minimises, ``--rank N`` N directions in each
    (``evbmf``: as many as stand out of noise), ``--target-speedup F`` as many as leave the model F times as fast,
    which is measured on its finished graph. With ``--max-drop`` and none of them the smallest budget is searched that
    keeps the score on the validation rows. ``--merge`` multiplies factors back where that pays.

    Raises:
        UsageError: A bad option, a pattern that matches nothing, or an amount that cannot be met.
        InputError: kdcli cannot operate on this architecture.
    """
    options = plan.options
    if options.merge:
        return merging.apply(context, plan.params)
    if isinstance(plan.rule, ConvolutionRule):
        return convolutions.apply(context, plan.rule, plan.config, plan.amount, plan.params)
    checkpoint = context.checkpoint
    work = Work(context, plan.rule, plan.config, plan.units)
    detail: dict[str, Any] = {}
    warnings = []
    ranks = work.decide(plan.amount, detail)
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    measured = work.replace(kept, last=True)
    before, after = work.parameters({}), work.parameters(kept)
    detail |= {"factorised": len(kept), "parameters_before": before, "parameters_after": after}
    detail["parameters_kept"] = after / before if before else None
    table = work.table(ranks, measured)
    if kept:
        members = {member: rank for name, rank in kept.items() for member in plan.units[name].members}
        shared = [list(plan.units[name].members) for name in kept if len(plan.units[name].members) > 1]
        checkpoint.log.transforms.append(Factorise(ranks=members, shared=shared))
        if options.epochs:
            detail["recovery"] = recover(
                context, epochs=options.epochs, lr=options.lr, batch_size=options.batch_size
            )
    else:
        if not plan.units:
            reason = "the encoder has no dense linear layer left"
        elif "max_drop" in plan.amount:
            reason = f"no budget below 1 keeps the {context.checkpoint.task.primary} within {plan.amount['max_drop']:g}"
        else:
            reason = "no rank is below break-even"
        text = f"nothing was factorised, the model is unchanged: {reason}"
        warnings.append(Warning_(code="nothing-factorised", message=text))
    if "target_speedup" in detail:
        warnings += speedup.missed(detail["target_speedup"])
    slower = [
        row for row in table if not row["kept_dense"] and row["latency_after_ms"] > row["latency_before_ms"]
    ]
    if kept and 2 * len(slower) > len(kept):
        text = (
            f"{len(slower)} of {len(kept)} factor pairs are slower at batch 1 than the matrix they replace: "
            "two thin products cost more than one below some size"
        )
        warnings.append(Warning_(code="thin-products", message=text))
    method = Method(name=options.method, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, warnings=warnings)


def foreseen(request: Request, sizes: Sizes) -> Foreseen:
    """Statistics, and the recovery.

    Raises:
        UsageError: A bad setting, or a method that cannot work with the task's answers.
    """
    options = request.options_as(LowRankOptions)
    registry.need_answers({options.method: rule_of(options.method)}, sizes.task)
    settings_of(options.method, request.common.settings)
    seconds = sizes.learning(STATISTICS_ROWS) + sizes.learning(options.epochs * sizes.rows["train"])
    return Foreseen({"method": options.method}, seconds)


def chosen(request: Request, detail: Mapping[str, Any]) -> list[str]:
    """What the validation rows chose."""
    options = request.options_as(LowRankOptions)
    found = ["the budget"] if "search" in detail else []
    return found + (["the epoch"] if options.epochs > 1 else [])


STAGE = Stage(prepare, apply, foreseen, chosen)


def _plan(context: Context) -> LowRankPlan:
    options = context.request.options_as(LowRankOptions)
    rule = rule_of(options.method)
    registry.need_answers({options.method: rule}, context.checkpoint.task)
    said = (options.budget, options.energy, options.rank, options.target_speedup)
    given: dict[str, Any] = {k: v for k, v in zip(AMOUNTS, said, strict=True) if v is not None}
    flags = ["--" + k.replace("_", "-") for k in given]
    if options.merge and (given or options.epochs):
        named = [*flags, *(["--epochs"] if options.epochs else [])]
        raise UsageError(
            f"--merge multiplies factors back and factorises nothing; leave out {', '.join(named)}"
        )
    if options.target_speedup is not None and processes.count() > 1:
        raise UsageError(
            "--target-speedup measures latencies, which several processes would disturb",
            "run it in one process, or give --budget",
        )
    config = settings_of(options.method, context.request.common.settings)
    checkpoint = context.checkpoint
    max_drop = context.request.common.gates.max_drop
    if not given:
        given = {"budget": BUDGET} if max_drop is None else {"max_drop": max_drop}
    patterns = {"include": list(options.include), "exclude": list(options.exclude)}
    params = given | patterns | config.model_dump() | {"epochs": options.epochs}
    if options.merge:
        return LowRankPlan(options, rule, config, {}, {"merge": True} | patterns, {})
    if isinstance(rule, ConvolutionRule):
        convolutions.chosen(context, rule, given)
        return LowRankPlan(options, rule, config, given, params, {})
    share = rule.shares and config.share_right
    units = _units(checkpoint.model, checkpoint.family, options, share)
    if (budget := given.get("budget")) is not None:
        sizes = {name: rank_budget.size_of(unit.dense) for name, unit in units.items()}
        rank_budget.even(sizes, budget)  # raises when it cannot be met
    return LowRankPlan(options, rule, config, given, params, units)


def rule_of(name: str) -> LinearRule | ConvolutionRule:
    """A method by its name."""
    found = registry.load("lowrank", name, registry.MethodSpec)
    assert isinstance(found, LinearRule | ConvolutionRule)
    return found


def settings_of(name: str, given: Mapping[str, str]) -> Any:
    """The settings of a method."""
    rule = rule_of(name)
    return rule.configured(registry.share_out("lowrank", given, {name: rule})[1][name])


def _units(model: nn.Module, family: Encoder, options: LowRankOptions, share: bool) -> dict[str, FactorUnit]:
    """What the patterns leave, in the order in which the model runs it, by the name of its first layer.

    Raises:
        UsageError: A pattern matches no layer, or no layer is left.
    """
    layers: dict[str, nn.Module] = {**encoder_linears(model, family)}
    tables: dict[str, nn.Module] = {}
    table = family.tokens
    if EMBEDDINGS in options.include:
        if not isinstance(model.get_submodule(table), nn.Embedding):
            raise UsageError(f"--include {EMBEDDINGS}: the table of the tokens is factorised already")
        tables[table] = model.get_submodule(table)
    include = tuple(pattern for pattern in options.include if pattern != EMBEDDINGS)
    what = "dense linear layer of the encoder"
    kept = tables | patterns_leave(layers, include, options.exclude, what, some=not tables)
    units = {}
    for group in _together(list(kept), family) if share else [(name,) for name in kept]:
        units[group[0]] = unit_of(model, group)
    return units


def _together(names: Sequence[str], family: Encoder) -> list[tuple[str, ...]]:
    """Names, with query, key and value of one attention joined where all three are there."""
    paths = (family.query, family.key, family.value)
    joined: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name.endswith("." + family.query):
            prefix = name.removesuffix(family.query)
            group = tuple(prefix + path for path in paths)
            if set(group) <= set(names):
                joined |= dict.fromkeys(group, group)
    return list(dict.fromkeys(joined.get(name, (name,)) for name in names))
