"""Factorising convolutions: ranks, and the table of what was done. The weights alone decide the factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.models import conv_factors
from kdcli.models.conv_factors import FactorisedConv
from kdcli.models.transforms import FactoriseConv
from kdcli.probe import rows as calibration
from kdcli.probe import speedup
from kdcli.probe.hooks import watching
from kdcli.probe.product_clock import torch_milliseconds
from kdcli.probe.speedup import Speed
from kdcli.report.schema import Method, Warning_
from kdcli.stages.lowrank import rank_budget, search, speed
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.lowrank.patterns import patterns_leave
from kdcli.stages.lowrank.rank_budget import Choices
from kdcli.stages.lowrank.rule import ConvolutionRule, ConvRanks
from kdcli.training.recovery import recover

_SAMPLES = 256  # rows for errors and trials
_TRIED = 5  # steps of a ladder on which a layer is factorised alone


def chosen(context: Context, rule: ConvolutionRule, amount: Mapping[str, Any]) -> dict[str, Any]:
    """The convolutions that the patterns leave.

    Raises:
        UsageError: The model has none, a pattern matches none, or the budget cannot be met.
    """
    options = context.request.options_as(LowRankOptions)
    inside = {
        f"{name}.{part}"
        for name, found in context.checkpoint.model.named_modules()
        if isinstance(found, FactorisedConv)
        for part, _ in found.named_modules()
        if part
    }
    found = {
        name: layer
        for name, layer in context.checkpoint.model.named_modules()
        if conv_factors.is_convolution(layer) and name not in inside
    }
    if not found and not inside:
        raise UsageError(
            f"--method {options.method} factorises convolutions, and the model has none",
            "matrices are factorised by --method two-sided",
        )
    layers = patterns_leave(found, options.include, options.exclude, "dense convolution")
    if (budget := amount.get("budget")) is not None and layers:
        _even(rule, layers, options.method, budget)
    return layers


def apply(
    context: Context, rule: ConvolutionRule, config: Any, amount: Mapping[str, Any], params: dict[str, Any]
) -> Applied:
    """Factorise the convolutions of ``context`` in place, then train it back for ``--epochs``."""
    options = context.request.options_as(LowRankOptions)
    kind, model, log = options.method, context.checkpoint.model, context.checkpoint.log
    layers = chosen(context, rule, amount)
    rows = calibration.sample(context, _SAMPLES)
    batches = calibration.unpadded(context, rows)
    inputs = _one_row(model, layers, batches)
    detail: dict[str, Any] = {"rows": len(rows)}
    made: dict[tuple[str, ConvRanks], FactorisedConv] = {}

    def factors(name: str, ranks: ConvRanks) -> FactorisedConv:
        if (name, ranks) not in made:
            made[name, ranks] = rule.decompose(layers[name], ranks, config).eval()
        return made[name, ranks]

    ranks = _decide(context, rule, kind, layers, amount, batches, inputs, factors, detail)
    kept = {name: r for name, r in ranks.items() if r is not None}
    pairs = {name: factors(name, r) for name, r in kept.items()}
    measured = _errors(model, layers, pairs, batches)
    for name, pair in pairs.items():
        model.set_submodule(name, pair)
    table = []
    for name, layer in layers.items():
        before, slow = _weights(layer), torch_milliseconds(layer, inputs[name])
        new = pairs.get(name)
        row: dict[str, Any] = {
            "name": name,
            "shape": list(layer.weight.shape),
            "rank": None if new is None else list(kept[name]),
            "parameters_before": before,
            "parameters_after": before if new is None else _weights(new),
            "error_predicted": 0.0 if new is None else conv_factors.error(layer, new),
            "error_measured": measured.get(name, 0.0),
            "latency_before_ms": slow,
            "latency_after_ms": slow if new is None else torch_milliseconds(new, inputs[name]),
            "kept_dense": new is None,
        }
        if (reason := conv_factors.why_not(layer)) is not None:
            row["reason"] = reason
        table.append(row)
    before, after = (sum(row[f"parameters_{when}"] for row in table) for when in ("before", "after"))
    detail |= {"factorised": len(pairs), "parameters_before": before, "parameters_after": after}
    detail["parameters_kept"] = after / before if before else None
    warnings = []
    if not pairs:
        text = "nothing was factorised, the model is unchanged: no ranks are below break-even"
        warnings.append(Warning_(code="nothing-factorised", message=text))
    else:
        if "target_speedup" in detail:
            warnings += speedup.missed(detail["target_speedup"])
        log.transforms.append(FactoriseConv(kind=kind, ranks={name: list(r) for name, r in kept.items()}))
        if options.epochs:
            detail["recovery"] = recover(
                context, epochs=options.epochs, lr=options.lr, batch_size=options.batch_size
            )
    method = Method(name=kind, params=params, detail=detail, layers=table)
    return Applied(context.checkpoint, method, warnings=warnings)


def _decide(
    context: Context,
    rule: ConvolutionRule,
    kind: str,
    layers: Mapping[str, Any],
    amount: Mapping[str, Any],
    batches: list[dict[str, Tensor]],
    inputs: Mapping[str, Tensor],
    factors: Any,
    detail: dict[str, Any],
) -> dict[str, ConvRanks | None]:
    """ConvRanks of every layer; None where it stays dense."""
    able = {name: layer for name, layer in layers.items() if conv_factors.why_not(layer) is None}
    none: dict[str, ConvRanks | None] = dict.fromkeys(layers)
    if {"energy", "rank"} & set(amount):
        for name, layer in able.items():
            if "energy" in amount:
                wanted = rule.by_energy(layer, amount["energy"])
            elif amount["rank"] == "evbmf":
                wanted = rule.by_evbmf(layer)
            else:
                wanted = rule.by_rank(layer, amount["rank"])
            pays = conv_factors.parameters(layer, kind, wanted) < _weights(layer)
            none[name] = wanted if pays else None
        return none
    model = context.checkpoint.model
    dense = calibration.logits(model, batches)
    curves: dict[str, tuple[list[ConvRanks], np.ndarray]] = {}
    with context.progress.task("each layer alone", len(able)) as task:
        for name, layer in able.items():
            steps: list[ConvRanks] = rule.ladder(layer)
            if steps:
                at = np.unique(np.linspace(0, len(steps) - 1, _TRIED).astype(int))
                found = []
                for step in at:
                    model.set_submodule(name, factors(name, steps[step]))
                    found.append(rank_budget.divergence(context.checkpoint.task, model, dense, batches))
                model.set_submodule(name, layer)
                # Falling, and straight between the tries on a logarithmic scale.
                logs = np.log(np.maximum(np.maximum.accumulate(found[::-1])[::-1], 1e-9))
                curves[name] = steps, np.exp(np.interp(np.arange(len(steps)), at, logs))
            task.advance()
    if "target_speedup" in amount:
        return none | _for_speedup(
            context, layers, curves, amount["target_speedup"], batches, inputs, factors, detail
        )

    def shared(budget: float, detail: dict[str, Any]) -> dict[str, ConvRanks | None]:
        even = _even(rule, layers, kind, budget)
        choices = {
            name: Choices(
                range(len(steps) + 1),
                np.array(
                    [
                        *(conv_factors.parameters(layers[name], kind, r) for r in steps),
                        _weights(layers[name]),
                    ],
                    float,
                ),
                np.append(harm, 0.0),
            )
            for name, (steps, harm) in curves.items()
        }
        fixed = sum(_weights(layer) for name, layer in layers.items() if name not in curves)
        allowed = budget * sum(map(_weights, layers.values())) - fixed
        picked = rank_budget.least(choices, allowed) if choices else {}
        weighed = dict.fromkeys(layers) | {
            name: curves[name][0][i] if i < len(curves[name][0]) else None for name, i in picked.items()
        }
        divergence = {}
        for title, ranks in (("even", even), ("weighted", weighed)):
            _put(model, {n: factors(n, r) for n, r in ranks.items() if r is not None})
            divergence[title] = rank_budget.divergence(context.checkpoint.task, model, dense, batches)
            _put(model, layers)
        best = min(divergence, key=divergence.__getitem__)
        detail["allocation"] = {"chosen": best, "rows": detail.get("rows"), "kl": divergence}
        return {"even": even, "weighted": weighed}[best]

    if "budget" in amount:
        return shared(amount["budget"], detail)

    def put(ranks: Mapping[str, ConvRanks | None]) -> None:
        _put(model, {n: factors(n, r) for n, r in ranks.items() if r is not None})

    best = search.smallest(
        context,
        amount["max_drop"],
        lambda budget: shared(budget, {}),
        put,
        lambda: _put(model, layers),
        detail,
    )
    return none if best is None else best


def _even(
    rule: ConvolutionRule, layers: Mapping[str, Any], kind: str, budget: float
) -> dict[str, ConvRanks | None]:
    """Give every layer at most the share ``budget`` of its own parameters.

    Raises:
        UsageError: The lowest ranks everywhere are already more than the budget.
    """
    ranks: dict[str, ConvRanks | None] = {}
    kept = 0
    for name, layer in layers.items():
        steps = rule.ladder(layer) if conv_factors.why_not(layer) is None else []
        costs = [conv_factors.parameters(layer, kind, r) for r in steps]
        fitting = [i for i, cost in enumerate(costs) if cost <= budget * _weights(layer)]
        at = fitting[-1] if fitting else 0
        ranks[name] = steps[at] if steps else None
        kept += costs[at] if steps else _weights(layer)
    dense = sum(map(_weights, layers.values()))
    if kept > budget * dense:
        raise UsageError(
            f"--budget {budget} cannot be met: the lowest ranks keep about {kept / dense:.2%} of the parameters",
            "give a larger budget, or include larger layers",
        )
    return ranks


def _for_speedup(
    context: Context,
    layers: Mapping[str, Any],
    curves: Mapping[str, tuple[list[ConvRanks], np.ndarray]],
    target: float,
    batches: list[dict[str, Tensor]],
    inputs: Mapping[str, Tensor],
    factors: Any,
    detail: dict[str, Any],
) -> dict[str, ConvRanks | None]:
    """The least damage among the ranks with which the finished graph is so much faster.

    The predictions are torch's latencies, of the layers and of the whole model.
    """
    if (earlier := speed.resumed(context, detail)) is not None:
        return earlier
    model = context.checkpoint.model

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(**{key: value[:1] for key, value in _middle(batches).items()}).logits

    choices: dict[str, Choices] = {}
    for name, (steps, harm) in curves.items():
        at = np.unique(np.linspace(0, len(steps) - 1, _TRIED).astype(int))
        times = [torch_milliseconds(factors(name, steps[i]), inputs[name]) for i in at]
        before = torch_milliseconds(layers[name], inputs[name])
        cost = np.maximum.accumulate(np.interp(np.arange(len(steps)), at, times))
        faster = np.flatnonzero(cost < before)
        choices[name] = Choices(
            [*(steps[i] for i in faster), None], np.append(cost[faster], before), np.append(harm[faster], 0.0)
        )

    def measure(picked: Mapping[str, ConvRanks | None]) -> Speed:
        _put(model, {n: factors(n, r) for n, r in picked.items() if r is not None})
        found = speedup.against_input(context, context.checkpoint)
        _put(model, layers)
        return found

    whole = torch_milliseconds(Whole(), torch.zeros(1))
    return speed.choose(context, target, choices, whole, measure, detail)


@torch.no_grad()
def _one_row(
    model: nn.Module, layers: Mapping[str, Any], batches: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What every layer gets for one row of the middle of the batches, for its latency."""
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found.setdefault(name, x.detach()[:1].clone())

    with watching(layers, see):
        model(**{key: value[:1] for key, value in _middle(batches).items()})
    return found


def _middle(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches come by length, so these are rows of middling length."""
    return batches[len(batches) // 2]


@torch.no_grad()
def _errors(
    model: nn.Module,
    layers: Mapping[str, Any],
    pairs: Mapping[str, nn.Module],
    batches: list[dict[str, Tensor]],
) -> dict[str, float]:
    """E |pair(x) - layer(x)|^2 / E |layer(x) - bias|^2 on the layers' inputs in the dense model."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in pairs}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        bias: Any = layers[name].bias
        plain = y if bias is None else y - bias.view(-1, *(1,) * (y.ndim - 2))
        wrong = (pairs[name](x) - y).square().sum()
        sums[name] += torch.stack([wrong, plain.square().sum()]).cpu()

    with watching({name: layers[name] for name in pairs}, see):
        for batch in batches:
            model(**batch)
    return {name: float(wrong / all_) if all_ else 0.0 for name, (wrong, all_) in sums.items()}


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _weights(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
