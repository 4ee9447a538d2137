"""``--target-speedup``: how much to cut for a model to be so many times faster on this machine at batch 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kdcli import cache
from kdcli.context import Applied, Context
from kdcli.devices import session_device
from kdcli.errors import UsageError
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.measure import environment
from kdcli.models import checkpoint as checkpoints
from kdcli.probe import layer_clock, speedup
from kdcli.probe.layer_clock import Timer
from kdcli.probe.speedup import Attempt, Chosen, Measure
from kdcli.stages.prune import units
from kdcli.stages.prune.latency import LatencyCurve, LatencyTable, kind_of, sizes
from kdcli.stages.prune.plan import PrunePlan
from kdcli.stages.prune.units import Amount
from kdcli.training.recovery import recover

HEADS, NEURONS = 4, 5  # sizes of each sub-layer that are measured
_FEW = 2  # sizes of each sub-layer where layers differ in more than their units


def table(context: Context, *, timer: Timer | None = None) -> LatencyTable:
    """Measure what the sub-layers of the input cost by their units, for a row of the data's mean length."""
    checkpoint = context.checkpoint
    model, family = checkpoint.model, checkpoint.family
    layers = encoder_layers(model, family)
    widest: dict[Any, Layer] = {}
    for part in ("heads", "neurons"):
        for layer in layers:
            if count := _count(layer, part):
                kind = kind_of(layer, part)
                if kind not in widest or count > _count(widest[kind], part):
                    widest[kind] = layer
    few = len(widest) > 2
    points = {"heads": _FEW if few else HEADS, "neurons": _FEW if few else NEURONS}
    # One more layer with one head: a graph in which nobody asks for the attention mask would lose that input.
    masker = max(layers, key=lambda layer: layer.heads).index
    whole = " ".join(f"{layer.heads}+{layer.neurons}" for layer in layers)
    made: dict[str, Callable[[], Any]] = {
        "none": _stack(context, masker, masker, "heads", 0),
        whole: lambda: layer_clock.stack(model, family, range(len(layers))),
    }
    names: dict[Any, list[tuple[int, str]]] = {}
    for kind, layer in widest.items():
        names[kind] = []
        for count in sizes(_count(layer, kind[0]), points[kind[0]]):
            name = f"{count} {' '.join(kind)}"
            made[name] = _stack(context, masker, layer.index, kind[0], count)
            names[kind].append((count, name))
    config = checkpoint.config
    found = layer_clock.milliseconds(
        f"{checkpoint.model_type} {len(layers)}x{config.hidden_size}/{layers[0].head_size}, {config.num_labels}",
        made,
        _tokens(context),
        progress=context.progress,
        threads=environment.threads(),
        device=session_device(context.device),
        timer=timer,
    )
    curves = {
        kind: LatencyCurve(
            tuple(count for count, _ in row),
            tuple((found[name] - found["none"]) / len(layers) for _, name in row),
        )
        for kind, row in names.items()
    }
    head = kind_of(layers[masker], "heads")
    return LatencyTable(curves, found["none"] - (curves[head].at(1) if head in curves else 0.0)).anchored(
        layers, found[whole]
    )


def check(context: Context, plan: PrunePlan, *, timer: Timer | None = None) -> LatencyTable:
    """The table, and whether the target can be met at all.

    Raises:
        UsageError: Even without all of those units the model would not be that much faster.
    """
    target, structure = plan.options.target_speedup, plan.options.structure
    assert target is not None
    found = table(context, timer=timer)
    layers = encoder_layers(context.checkpoint.model, context.checkpoint.family)
    now, least = found.total(layers), found.least(layers, structure)
    if least * target > now:
        raise UsageError(
            f"--target-speedup {target:g} cannot be met by removing {structure}: of {now:.3g} ms at batch 1 "
            f"{least:.3g} ms are spent elsewhere, so {now / least:.2f} is the most",
            "give a lower target" + ("" if "+" in structure else ", or prune heads+neurons"),
        )
    return found


def apply(
    context: Context, plan: PrunePlan, *, timer: Timer | None = None, measure: Measure | None = None
) -> Applied:
    """Cut by the table, measure the model, and cut the input again where it missed the target.

    A gradual cut is made once: it takes a training, and its speed is known only after that.
    """
    prices = check(context, plan, timer=timer)
    options, target = plan.options, plan.options.target_speedup
    assert target is not None
    gradual = options.schedule == "gradual"
    start, chosen = context.checkpoint, context.resume_dir / "speed.json"
    layers = encoder_layers(start.model, start.family)
    dense, table_row = prices.total(layers), _described(prices, layers, context)

    uncut = True

    def cut(share: float) -> tuple[Applied, Context]:
        nonlocal uncut
        inner = context
        if not uncut:  # the first one cuts the model as it was loaded
            loaded = checkpoints.load(start.path, labels=start.labels, device=context.device)
            loaded.task = start.task  # --metric is not in the files
            inner = replace(context, checkpoint=loaded)
        uncut = False
        now = encoder_layers(inner.checkpoint.model, inner.checkpoint.family)
        amount = Amount(prices.price, prices.remove(now, options.structure, share), recover=False)
        return units.apply(inner, plan, amount), inner

    # Another measurement could ask for another cut, and the training that goes on belongs to this one.
    resuming = context.request.common.resume and options.epochs and not gradual
    if earlier := cache.load_json(chosen) if resuming else None:
        tries, number = earlier["tries"], earlier["number"]
        found = Chosen(cut(tries[number]["share_of_time"]), number, tries)
    else:

        def attempt(share: float) -> Attempt[tuple[Applied, Context]]:
            made = cut(share)
            model = made[1].checkpoint
            predicted = dense / prices.total(encoder_layers(model.model, model.family))
            facts = {"macs_kept": made[0].method.detail["encoder_macs_kept"]}
            return Attempt(made, predicted, (measure or speedup.against_input)(context, model), facts)

        found = speedup.correct(context, target, attempt, rounds=1 if gradual else speedup.ROUNDS)
    applied, inner = found.result
    if options.epochs and not gradual:
        cache.save_json(chosen, {"tries": found.tries, "number": found.number})
        applied.method.detail["recovery"] = recover(inner, **plan.training)
    summary = speedup.summary(target, found)
    applied.method.detail["target_speedup"] = summary | {"table": table_row}
    applied.warnings += speedup.missed(summary)
    return applied


def _described(prices: LatencyTable, layers: Sequence[Layer], context: Context) -> dict[str, Any]:
    return {
        "tokens": _tokens(context),
        "batch": 1,
        "threads": environment.threads(),
        "milliseconds": prices.total(layers),
        "rest": prices.rest,
        "curves": [
            {"part": " ".join(kind), "units": curve.units, "milliseconds": curve.milliseconds}
            for kind, curve in prices.curves.items()
        ],
    }


def _stack(context: Context, masker: int, layer: int, part: str, count: int) -> Callable[[], Any]:
    model, family = context.checkpoint.model, context.checkpoint.family
    copies = len(model.get_submodule(family.layers))  # type: ignore[arg-type]

    def change(copied: Layer) -> None:
        extra = copied.index == copies
        copied.keep_heads(range(1 if extra else count if part == "heads" else 0))
        copied.keep_neurons(range(0 if extra else count if part == "neurons" else 0))

    return lambda: layer_clock.stack(model, family, [*[layer] * copies, masker], change)


def _count(layer: Layer, part: str) -> int:
    return layer.heads if part == "heads" else layer.neurons


def _tokens(context: Context) -> int:
    return max(2, round(float(context.encoded["train"].lengths.mean())))
