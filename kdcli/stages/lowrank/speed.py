"""``lowrank --target-speedup``: ranks from the latencies of layers, corrected by those of finished graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdcli import cache
from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.probe import speedup
from kdcli.probe.speedup import Attempt, Speed
from kdcli.stages.lowrank import rank_budget
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.lowrank.rank_budget import Choices

PickedRanks = dict[str, Any]
"""Layer name -> what it becomes, one of the options of its choices: a rank, ranks, or None (dense)."""

_FILE = "speed.json"


def resumed(context: Context, detail: dict[str, Any]) -> PickedRanks | None:
    """What an interrupted run had chosen, when it is resumed.

    Another measurement could ask for other ranks, and the training that goes on belongs to those.
    """
    if not context.request.common.resume:
        return None
    if (earlier := cache.load_json(context.resume_dir / _FILE)) is None:
        return None
    detail["target_speedup"] = earlier["target_speedup"]
    return {name: tuple(rank) if isinstance(rank, list) else rank for name, rank in earlier["ranks"].items()}


def choose(
    context: Context,
    target: float,
    choices: Mapping[str, Choices],
    whole: float,
    measure: Callable[[PickedRanks], Speed],
    detail: dict[str, Any],
) -> PickedRanks:
    """Choose what every layer becomes, so that the damage is least and the finished model fast enough.

    What layers cost alone is not what they cost in the finished graph, where some are fused and all share the
    processor's cache. So the model is measured, and the allowance of time corrected, as ``speedup.correct`` says.

    Args:
        context: The input, dense.
        target: Speed-up, above 1.
        choices: Of each layer what is faster than the layer by its latency alone, in ms, and last the layer itself.
        whole: Latency of the input model in ms, by the same clock.
        measure: The speed-up of the finished graph.
        detail: Gets ``target_speedup``: the tries, and what was predicted and measured.

    Raises:
        UsageError: The fastest options of all layers together do not make the model that fast.
    """
    faster = sum(len(c.options) > 1 for c in choices.values())
    if not faster:
        raise UsageError(
            f"--target-speedup {target:g} cannot be met: no factors are faster here than the layer they replace, "
            "so 1 is the most",
            "give --budget for a smaller model, or remove units for a faster one: kdcli prune",
        )
    dense, least = (sum(float(c.cost[at]) for c in choices.values()) for at in (-1, 0))
    seen: list[dict[str, int]] = []

    def attempt(share: float) -> Attempt[PickedRanks] | None:
        at = rank_budget.least(choices, whole * share - (whole - dense))
        if at in seen:
            return None
        seen.append(at)
        picked = {name: choices[name].options[i] for name, i in at.items()}
        spent = sum(float(choices[name].cost[i]) for name, i in at.items())
        speed = measure(picked)
        if spent <= least * (1 + 1e-9) and not speed.reaches(target):
            raise UsageError(
                f"--target-speedup {target:g} cannot be met: the finished model with the fastest factors in all "
                f"{faster} layers that get faster is {speed.value:.2f} times as fast, and that is the most",
                "give a lower target, or remove units first: kdcli prune",
            )
        facts = {"factorised": sum(rank is not None for rank in picked.values())}
        return Attempt(picked, whole / max(whole - dense + spent, 1e-9), speed, facts)

    chosen = speedup.correct(context, target, attempt)
    detail["target_speedup"] = speedup.summary(target, chosen) | {
        "latency": {"model_ms": whole, "layers_ms": dense}
    }
    options = context.request.options
    if isinstance(options, LowRankOptions) and options.epochs:
        kept = {"ranks": chosen.result, "target_speedup": detail["target_speedup"]}
        cache.save_json(context.resume_dir / _FILE, kept)
    return chosen.result
