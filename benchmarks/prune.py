"""Question: how much accuracy does each criterion keep when heads and neurons go, and what is gained?

Runs `kdcli prune` once for every line of the plan below through the installed command, skips what is there, and
prints Markdown tables. `criteria` has every method that prunes heads and neurons at half of the encoder's
multiply-accumulates; `shares` has the default and its best rival at 75% and 30%; `recovery` gives both one epoch of
distillation from the dense model. Seeds draw the calibration rows.

    python benchmarks/prune.py run criteria --data clinc150=DIR --data sst2=DIR --model clinc150=DIR ...
    python benchmarks/prune.py run criteria shares recovery --lane 0/2 ...   # every second line; two share the cores
    python benchmarks/prune.py table --latency --data ... --model ...

Latencies of runs that shared a machine are not comparable: `table --latency` measures the models of the first seed
again, together and alone on the machine, and judges each with onnxruntime and the tokenizer alone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import common
from common import by_onnxruntime_alone, header, mean, pairs, reports

from kdcli import registry
from kdcli.stages.prune.criterion import Criterion
from kdcli.stages.prune.options import STRUCTURES

STRUCTURE = "heads+neurons"
DEFAULT = STRUCTURES[STRUCTURE]
SEEDS = (0, 1, 2)
GROUPS = ("criteria", "shares", "recovery")
TITLES = [
    *("model", "data", "accuracy", "lost", "onnxruntime alone", "MACs kept", "parameters", "model.onnx"),
    *("p50 b1", "p50 b32", "speed-up b1", "speed-up b32", "pruning", "command"),
]

Line = tuple[str, tuple[int, ...], list[str]]


def unit_methods() -> list[str]:
    """Names of all methods that prune heads and neurons together."""
    return [
        name
        for name in registry.names("prune")
        if STRUCTURE in registry.load("prune", name, Criterion).structures
    ]


def plan(group: str, rival: str) -> list[Line]:
    """Name, seeds and options of every line of a group."""
    both = list(dict.fromkeys((DEFAULT, rival)))
    if group == "shares":
        return [
            (f"{name}-{share}", SEEDS, ["--method", name, "--budget", f"0.{share}", *trained(name)])
            for share in (75, 30)
            for name in both
        ]
    if group == "recovery":
        return [
            (f"{name}-50-epoch", SEEDS, ["--method", name, "--budget", "0.5", "--epochs", "1"])
            for name in both
        ]
    lines: list[Line] = []
    for name in unit_methods():
        words = ["--method", name, "--budget", "0.5", *trained(name)]
        seeds = SEEDS if registry.load("prune", name, Criterion).reads_rows else SEEDS[:1]
        lines.append((f"{name}-50", seeds, words))
        if registry.load("prune", name, Criterion).scores_again:
            lines.append((f"{name}-50-oneshot", SEEDS[:1], [*words, "--schedule", "one-shot"]))
    return lines


def trained(name: str) -> list[str]:
    """A method that learns what to remove cannot do without an epoch."""
    return ["--epochs", "1"] if registry.load("prune", name, Criterion).trained else []


def run(given: argparse.Namespace) -> None:
    """Run every line of the chosen groups that is not there yet."""
    data, models = pairs(given.data), pairs(given.model)
    lines = [
        (
            f"{name} {source} seed {seed}",
            given.out / f"{name}--{source}--{seed}",
            [models[source], "--structure", STRUCTURE, "--data", data[source], "--seed", str(seed), *options],
        )
        for group in given.groups
        for name, seeds, options in plan(group, given.rival)
        for source in data
        for seed in seeds
    ]
    common.run_lines("prune", lines, given.lane)


def table(given: argparse.Namespace) -> None:
    """Print every group that has results."""
    everything = reports(given.out)
    data, models = pairs(given.data), pairs(given.model)
    fresh: dict[Path, dict[str, Any]] = {}
    dense: dict[str, dict[str, Any]] = {}
    for (_, source), by_seed in everything.items():
        dense.setdefault(source, next(iter(by_seed.values()))["before"])
    if given.latency:
        for source in data:
            paths = [
                by_seed[min(by_seed)]["path"] for (_, one), by_seed in everything.items() if one == source
            ]
            measured = common.measured_together([models[source], *paths], "--data", data[source])
            dense[source] = measured[0]
            fresh |= dict(zip(paths, measured[1:], strict=True))
    for group in GROUPS:
        lines = [
            row(name, source, everything[name, source], dense[source], fresh, data if given.latency else {})
            for name, _, _ in plan(group, given.rival)
            for source in sorted(dense)
            if (name, source) in everything
        ]
        if lines:
            print(f"\n## {group}\n", header(TITLES), *lines, sep="\n")


def row(
    name: str,
    source: str,
    by_seed: dict[int, dict[str, Any]],
    dense: dict[str, Any],
    fresh: dict[Path, dict[str, Any]],
    data: dict[str, str],
) -> str:
    """One line: accuracy over all seeds, everything else of the first one."""
    first = by_seed[min(by_seed)]
    after = fresh.get(first["path"], first["after"])
    accuracies = [report["after"]["quality"]["accuracy"]["value"] for report in by_seed.values()]
    lost = dense["quality"]["accuracy"]["value"] - statistics.mean(accuracies)
    alone = by_onnxruntime_alone(first["path"], Path(data[source]) / "test.csv") if data else None
    before, now = common.p50(dense), common.p50(after)
    cells = [
        name,
        source,
        mean(accuracies),
        common.share(lost),
        common.share(alone),
        f"{first['method']['detail']['encoder_macs_kept']:.1%}",
        common.parameters(after),
        common.mib(after["size"]["onnx_bytes"]),
        *(f"{now[batch]:.3f} ms" for batch in (1, 32)),
        *(f"{before[batch] / now[batch]:.2f}" for batch in (1, 32)),
        f"{statistics.mean(report['timings']['apply'] for report in by_seed.values()):.0f} s",
        f"{statistics.mean(sum(report['timings'].values()) for report in by_seed.values()):.0f} s",
    ]
    return common.row(cells)


def main() -> None:
    parser = common.parser(__doc__)
    running, showing = common.commands(parser, run, table)
    running.add_argument("groups", nargs="+", choices=GROUPS)
    common.lane(running)
    showing.add_argument("--latency", action="store_true")
    for command in (running, showing):
        command.add_argument("--rival", default="fisher", choices=unit_methods())
        common.named(command, "data", "model")
        command.add_argument("--out", type=Path, default=Path("kdcli-out/prune"))
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
