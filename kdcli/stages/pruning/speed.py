"""``--target-speedup``: how much to cut for a model to be so many times faster on this machine at batch 1."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.errors import UsageError
from kdcli.measure import environment
from kdcli.methods.prune_latency import Curve, Table, kind_of, sizes
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.families import Layer, encoder_layers
from kdcli.report.schema import Warning_
from kdcli.stages import graph as graphs
from kdcli.stages import layer_speed, measuring
from kdcli.stages.context import Applied, Context
from kdcli.stages.layer_speed import Timer
from kdcli.stages.pruning import units
from kdcli.stages.pruning.plan import Plan
from kdcli.stages.pruning.units import Amount
from kdcli.stages.recovery import recover
from kdcli.stages.timing import Timings

ROUNDS = 3  # cuts at most: the first by the table, the others corrected by what the one before measured
HEADS, NEURONS = 4, 5  # sizes of each sub-layer that are measured
_RUNS = 7
_FEW = 2  # sizes of each sub-layer where layers differ in more than their units
_SLACK = 0.02  # a speed-up is not known better than that
_OVER = 0.1  # more than that above the target gives away accuracy


@dataclass(frozen=True)
class Speed:
    """A measured speed-up and its standard error."""

    value: float
    noise: float


Measure = Callable[[Context, Checkpoint], Speed]


def table(context: Context, *, timer: Timer | None = None) -> Table:
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
        whole: lambda: layer_speed.stack(model, family, range(len(layers))),
    }
    names: dict[Any, list[tuple[int, str]]] = {}
    for kind, layer in widest.items():
        names[kind] = []
        for count in sizes(_count(layer, kind[0]), points[kind[0]]):
            name = f"{count} {' '.join(kind)}"
            made[name] = _stack(context, masker, layer.index, kind[0], count)
            names[kind].append((count, name))
    config = checkpoint.config
    found = layer_speed.milliseconds(
        f"{checkpoint.model_type} {len(layers)}x{config.hidden_size}/{layers[0].head_size}, {config.num_labels}",
        made,
        _tokens(context),
        progress=context.progress,
        threads=environment.threads(),
        device=_device(context),
        timer=timer,
    )
    curves = {
        kind: Curve(
            tuple(count for count, _ in row),
            tuple((found[name] - found["none"]) / len(layers) for _, name in row),
        )
        for kind, row in names.items()
    }
    head = kind_of(layers[masker], "heads")
    return Table(curves, found["none"] - (curves[head].at(1) if head in curves else 0.0)).anchored(
        layers, found[whole]
    )


def check(context: Context, plan: Plan, *, timer: Timer | None = None) -> Table:
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
    context: Context, plan: Plan, *, timer: Timer | None = None, measure: Measure | None = None
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

    def cut(share: float, number: int) -> tuple[Applied, Context]:
        inner = context
        if number > 1:  # the first one cuts the model as it was loaded
            loaded = checkpoints.load(start.path, labels=start.labels, device=context.device)
            inner = replace(context, checkpoint=loaded)
        now = encoder_layers(inner.checkpoint.model, inner.checkpoint.family)
        amount = Amount(prices.price, prices.remove(now, options.structure, share), recover=False)
        return units.apply(inner, plan, amount), inner

    tries: list[dict[str, Any]] = []
    if context.request.common.resume and options.epochs and not gradual and chosen.exists():
        # Another measurement could ask for another cut, and the training that goes on belongs to this one.
        earlier = json.loads(chosen.read_text(encoding="utf-8"))
        tries, number = earlier["tries"], earlier["number"]
        applied, inner = cut(tries[number]["share_of_time"], 1)
    else:
        share, best = 1 / target, None
        for _ in range(1 if gradual else ROUNDS):
            done = cut(share, len(tries) + 1)
            model = done[1].checkpoint
            speed = (measure or against_input)(context, model)
            row = {
                "share_of_time": share,
                "macs_kept": done[0].method.detail["encoder_macs_kept"],
                "predicted": dense / prices.total(encoder_layers(model.model, model.family)),
                "measured": speed.value,
                "noise": speed.noise,
            }
            tries.append(row)
            context.progress.note(
                f"{target:g} times faster asked for, {row['predicted']:.2f} predicted, {speed.value:.2f} measured"
            )
            if best is None or _better(speed, _speed(tries[best[0]]), target):
                best = (len(tries) - 1, *done)
            if target - _noise(speed, target) <= speed.value <= target * (1 + _OVER) + speed.noise:
                break
            # What was saved is off by one factor, as far as one number can tell.
            saved = max(1 - 1 / speed.value, 1e-6)
            share = max(0.0, 1 - (1 - share) * min(2.0, (1 - 1 / target) / saved))
        assert best is not None
        number, applied, inner = best
    speed = _speed(tries[number])
    if options.epochs and not gradual:
        chosen.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_text(json.dumps({"tries": tries, "number": number}), encoding="utf-8")
        applied.method.detail["recovery"] = recover(inner, **plan.training)
    applied.method.detail["target_speedup"] = {
        "target": target,
        "predicted": tries[number]["predicted"],
        "measured": speed.value,
        "noise": speed.noise,
        "tries": tries,
        "table": table_row,
    }
    if speed.value < target - _noise(speed, target):
        said = f"{speed.value:.2f} times faster at batch 1 where {target:g} was asked for"
        applied.warnings.append(Warning_(code="speedup-missed", message=said))
    return applied


def _described(prices: Table, layers: Sequence[Layer], context: Context) -> dict[str, Any]:
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


def _speed(row: Mapping[str, Any]) -> Speed:
    return Speed(row["measured"], row["noise"])


def _noise(speed: Speed, target: float) -> float:
    return max(speed.noise, _SLACK * target)


def against_input(context: Context, checkpoint: Checkpoint) -> Speed:
    """How many times faster than the input a model is at batch 1, on rows of the measured split, in turns."""
    rows = context.encoded["test" if "test" in context.encoded else "validation"]
    threads, device, progress = environment.threads(), _device(context), context.progress
    before = context.input_graph
    if before is None:
        given = checkpoints.load(context.checkpoint.path, device=context.device)
        before, _ = graphs.of_input(given, rows, threads=threads, timings=Timings(), progress=progress)
    with tempfile.TemporaryDirectory(prefix="kdcli-speed-") as folder:
        after = graphs.build(
            checkpoint,
            Path(folder) / graphs.FILE,
            rows,
            threads=threads,
            timings=Timings(),
            progress=progress,
        ).path
        batches = measuring.latency_batches(rows, checkpoint.pad_id, 1)
        times = layer_speed.in_turns(
            [before, after], batches, threads=threads, device=device, rounds=_RUNS, progress=progress
        )
    return speed_of(times[0] / times[1])


def speed_of(ratios: np.ndarray) -> Speed:
    """The median of the rows' ratios (B,), and its standard error, about 1.25 times that of a mean."""
    spread = float(np.subtract(*np.percentile(ratios, [75, 25]))) / 1.349  # as a standard deviation
    return Speed(float(np.median(ratios)), 1.25 * spread / len(ratios) ** 0.5)


def _better(one: Speed, other: Speed, target: float) -> bool:
    """Of those that meet the target the slowest, which was cut least; else the fastest."""
    limit = target * (1 - _SLACK)
    if (one.value >= limit) != (other.value >= limit):
        return one.value >= limit
    return one.value < other.value if one.value >= limit else one.value > other.value


def _stack(context: Context, masker: int, layer: int, part: str, count: int) -> Callable[[], Any]:
    model, family = context.checkpoint.model, context.checkpoint.family
    copies = len(model.get_submodule(family.layers))  # type: ignore[arg-type]

    def change(copied: Layer) -> None:
        extra = copied.index == copies
        copied.keep_heads(range(1 if extra else count if part == "heads" else 0))
        copied.keep_neurons(range(0 if extra else count if part == "neurons" else 0))

    return lambda: layer_speed.stack(model, family, [*[layer] * copies, masker], change)


def _count(layer: Layer, part: str) -> int:
    return layer.heads if part == "heads" else layer.neurons


def _tokens(context: Context) -> int:
    return max(2, round(float(context.encoded["train"].lengths.mean())))


def _device(context: Context) -> str:
    from kdcli.stages.runner import session_device

    return session_device(context.device)
