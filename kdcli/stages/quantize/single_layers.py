"""Which layers lose what when they are quantised, and the fewest to keep in float for a drop that is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcli import families
from kdcli.inputs import sampling
from kdcli.inputs.text import Encoded
from kdcli.models.checkpoint import Checkpoint
from kdcli.probe.bisection import keeps
from kdcli.progress import Progress
from kdcli.report import metrics
from kdcli.stages.quantize.simulated import Answers, Simulation

# The divergence of probabilities is told apart with few rows; a search by accuracy needs more.
SENSITIVITY_ROWS = 256


@dataclass
class LayerGroup:
    """Layers that are quantised or kept together, with what that does."""

    name: str
    layers: list[str]
    #: Mean divergence from the float model's answers, and score, with this unit alone quantised ...
    alone: tuple[float, float] = (0.0, 0.0)
    #: ... and with this unit alone kept in float.
    kept: tuple[float, float] = (0.0, 0.0)

    def row(self, metric: str) -> dict[str, Any]:
        """For the report, the scores as values of the metric."""
        shown = metrics.of(metric).of_score
        return {
            "unit": self.name,
            "layers": len(self.layers),
            "divergence_one_quantised": self.alone[0],
            f"{metric}_one_quantised": shown(self.alone[1]),
            "divergence_one_kept": self.kept[0],
            f"{metric}_one_kept": shown(self.kept[1]),
        }


@dataclass
class FewestKept:
    """Outcome of a search."""

    kept: list[str]  # units
    layers: set[str]  # theirs
    drop: float
    met: bool
    tried: list[dict[str, Any]] = field(default_factory=list)


def units(checkpoint: Checkpoint, layers: list[str]) -> list[LayerGroup]:
    """Group layers: query, key and value of one attention are one operator in a fused graph, so one unit."""
    made: dict[str, LayerGroup] = {}
    for layer in layers:
        name = _unit_of(checkpoint, layer)
        made.setdefault(name, LayerGroup(name, [])).layers.append(layer)
    return list(made.values())


def measure(
    simulation: Simulation, checkpoint: Checkpoint, rows: Encoded, progress: Progress
) -> dict[str, Any]:
    """Quality with one unit quantised and with one unit kept, for every unit, most sensitive first.

    Returns:
        ``units``: :class:`LayerGroup` objects; ``rows``, ``all`` and ``none``: how many rows, and (divergence,
        accuracy) with everything and with nothing quantised.
    """
    few = sampling.judged(rows, SENSITIVITY_ROWS, sampling.JUDGING_SEED, checkpoint.task)
    everything = set(simulation.layers)
    found = units(checkpoint, simulation.layers)
    base = simulation.answers(set(), few)

    def quality(answers: Answers) -> tuple[float, float]:
        return base.divergence(answers), answers.score

    whole = quality(simulation.answers(everything, few))
    with progress.task("sensitivity", len(found)) as task:
        for unit in found:
            unit.alone = quality(simulation.answers(set(unit.layers), few))
            unit.kept = quality(simulation.answers(everything - set(unit.layers), few))
            task.advance()
    found.sort(key=lambda unit: unit.kept[0])
    return {"units": found, "rows": len(few), "all": whole, "none": (0.0, base.score)}


def search(
    simulation: Simulation,
    found: list[LayerGroup],
    rows: Encoded,
    base: Answers,
    max_drop: float,
    first: Answers,
) -> FewestKept:
    """The fewest units to keep so that the score on ``rows`` falls by at most ``max_drop``.

    Units are kept in the order of what that gains, and in the order of what they lose alone: where little is left
    of a model, keeping one unit gains nothing. The smallest number that will do is found by halving, then each
    kept unit is given up again if the rest will do. At least one unit is quantised. Unlike
    :func:`kdcli.probe.bisection.search` it looks for a number of units, in two orders, and may come back to one.

    Args:
        simulation: The model.
        found: Units, the one whose keeping gains most first.
        rows: Labelled rows.
        base: The float model's answers to them.
        max_drop: In the unit of the primary metric.
        first: Answers with everything quantised.
    """
    everything = set(simulation.layers)
    tried: list[dict[str, Any]] = []
    known: dict[frozenset[str], float] = {frozenset(): base.score - first.score}

    def drop(kept: list[LayerGroup]) -> float:
        names = frozenset(unit.name for unit in kept)
        if names not in known:
            layers = everything - {layer for unit in kept for layer in unit.layers}
            known[names] = base.score - simulation.answers(layers, rows).score
            tried.append({"kept": len(kept), "drop": known[names]})
        return known[names]

    def fewest(order: list[LayerGroup]) -> list[LayerGroup] | None:
        low, high = 1, len(order) - 1  # keeping none has failed
        good = None
        while low <= high:
            middle = (low + high) // 2
            if keeps(drop(order[:middle]), max_drop):
                good, high = order[:middle], middle - 1
            else:
                low = middle + 1
        return good

    orders = [found, sorted(found, key=lambda unit: -unit.alone[0])]
    will_do = [kept for order in orders if (kept := fewest(order)) is not None]
    if not will_do:
        best = min(known, key=lambda names: (known[names], len(names)))
        return _outcome([unit for unit in found if unit.name in best], known[best], False, tried)
    good = min(will_do, key=len)
    for unit in reversed(list(good)):
        rest = [one for one in good if one is not unit]
        if rest and keeps(drop(rest), max_drop):
            good = rest
    return _outcome(good, drop(good), True, tried)


def _outcome(kept: list[LayerGroup], drop: float, met: bool, tried: list[dict[str, Any]]) -> FewestKept:
    layers = {layer for unit in kept for layer in unit.layers}
    return FewestKept([unit.name for unit in kept], layers, drop, met, tried)


def _unit_of(checkpoint: Checkpoint, layer: str) -> str:
    family = families.encoders().get(checkpoint.model_type)
    if family is None or not layer.startswith(f"{family.layers}."):
        return layer
    number, _, inside = layer.removeprefix(f"{family.layers}.").partition(".")
    for part in (family.query, family.key, family.value):
        if inside == part:
            return f"{family.layers}.{number}.{family.attention}"
    return layer


def table(found: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What :func:`measure` found, for the report, the scores as values of the metric."""
    shown = metrics.of(metric).of_score
    return {
        "rows": found["rows"],
        "divergence_all_quantised": found["all"][0],
        f"{metric}_all_quantised": shown(found["all"][1]),
        f"{metric}_none_quantised": shown(found["none"][1]),
        "units": [unit.row(metric) for unit in found["units"]],
    }
