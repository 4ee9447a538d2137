"""Question: which criterion keeps most when single weights become zero, and what are the zeros worth in an archive?

Runs `kdcli prune` for magnitude, Wanda and SparseGPT at 50, 70 and 80% of the encoder's weights and 2:4, without
training, and movement pruning with one epoch at 80% beside magnitude with one epoch of recovery; skips what is
there, and prints one Markdown table.

    python benchmarks/prune_zeros.py run --data clinc150=DIR --model clinc150=DIR ...
    python benchmarks/prune_zeros.py run --lane 0/2 ...       # every second line; two processes share the cores
    python benchmarks/prune_zeros.py table
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill import pairs, reports
from pipeline import kdcli

ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
SHARES = ("0.5", "0.7", "0.8")
TITLES = ["method", "zeros", *("accuracy", "lost", "model.onnx", "gzipped"), "p50 b1", "pruning", "command"]

#: name -> options
PLAN: dict[str, list[str]] = {
    **{
        f"{method}-{share}": ["--structure", "weights", "--sparsity", share, "--method", method]
        for share in SHARES
        for method in ONE_SHOT
    },
    **{f"{method}-2of4": ["--structure", "2:4", "--method", method] for method in ONE_SHOT},
    **{
        f"{method}-0.8-epoch": [
            *["--structure", "weights", "--sparsity", "0.8", "--method", method, "--epochs", "1"]
        ]
        for method in ("magnitude", "sparsegpt", "movement")
    },
}


def run(given: argparse.Namespace) -> None:
    """Run every line that is not there yet."""
    data, models = pairs(given.data), pairs(given.model)
    number, lanes = (int(part) for part in given.lane.split("/"))
    lines = [(name, source, options) for name, options in PLAN.items() for source in data]
    for name, source, options in lines[number::lanes]:
        out = given.out / f"{name}--{source}--0"
        if (out / "report.json").is_file():
            continue
        print(f"{name} {source}", file=sys.stderr, flush=True)
        try:
            kdcli("prune", models[source], "--data", data[source], *options, "-o", str(out))
        except subprocess.CalledProcessError as error:
            print(f"  failed with exit code {error.returncode}", file=sys.stderr, flush=True)


def table(given: argparse.Namespace) -> None:
    """Print what has been run, one table a data set."""
    everything = reports(given.out)
    for source in sorted({source for _, source in everything}):
        found = {name: by_seed[0] for name in PLAN if (by_seed := everything.get((name, source))) is not None}
        print(f"\n{source}\n\n| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
        dense = next(iter(found.values()))["before"]
        print(line(["dense", ""], dense, dense, ["", ""]))
        for name, report in found.items():
            took = [report["timings"]["apply"], sum(report["timings"].values())]
            zeros = f"{report['method']['detail']['zero_share']:.0%}"
            print(line([name, zeros], report["after"], dense, [f"{seconds:.0f} s" for seconds in took]))


def line(first: list[str], measured: dict[str, Any], dense: dict[str, Any], last: list[str]) -> str:
    accuracy, before = (one["quality"]["accuracy"] for one in (measured, dense))
    size = measured["size"]
    p50 = {entry["batch"]: entry["p50_ms"] for entry in measured["latency"]}
    cells = [
        *first,
        f"{100 * accuracy['value']:.2f} ± {100 * accuracy['stderr']:.2f}",
        f"{100 * (before['value'] - accuracy['value']):.2f}",
        f"{size['onnx_bytes'] / 2**20:.1f} MiB",
        f"{size['onnx_gzip_bytes'] / 2**20:.1f} MiB",
        f"{p50[1]:.2f} ms",
        *last,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("table", table)):
        command = commands.add_parser(name)
        if name == "run":
            command.add_argument("--lane", default="0/1", help="K/N: every N-th line, from the K-th")
            command.add_argument("--data", action="append", default=[], metavar="NAME=DIR")
            command.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
        command.add_argument("--out", type=Path, default=Path("kdcli-out/prune-zeros"))
        command.set_defaults(function=function)
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
