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
from pathlib import Path
from typing import Any

import common
from common import header, mib, pairs, reports

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
    lines = [
        (
            f"{name} {source}",
            given.out / f"{name}--{source}--0",
            [models[source], "--data", data[source], *options],
        )
        for name, options in PLAN.items()
        for source in data
    ]
    common.run_lines("prune", lines, given.lane)


def table(given: argparse.Namespace) -> None:
    """Print what has been run, one table a data set."""
    everything = reports(given.out)
    for source in sorted({source for _, source in everything}):
        found = {name: by_seed[0] for name in PLAN if (by_seed := everything.get((name, source))) is not None}
        print(f"\n{source}\n\n{header(TITLES)}")
        dense = next(iter(found.values()))["before"]
        print(line(["dense", ""], dense, dense, ["", ""]))
        for name, report in found.items():
            took = [report["timings"]["apply"], sum(report["timings"].values())]
            zeros = f"{report['method']['detail']['zero_share']:.0%}"
            print(line([name, zeros], report["after"], dense, [f"{seconds:.0f} s" for seconds in took]))


def line(first: list[str], measured: dict[str, Any], dense: dict[str, Any], last: list[str]) -> str:
    size = measured["size"]
    now, before = (one["quality"]["accuracy"]["value"] for one in (measured, dense))
    cells = [
        *(*first, common.accuracy(measured), common.share(before - now)),
        *(mib(size["onnx_bytes"], 1), mib(size["onnx_gzip_bytes"], 1)),
        *(f"{common.p50(measured)[1]:.2f} ms", *last),
    ]
    return common.row(cells)


def main() -> None:
    parser = common.parser(__doc__)
    running, showing = common.commands(parser, run, table)
    common.lane(running)
    common.named(running, "data", "model")
    for command in (running, showing):
        command.add_argument("--out", type=Path, default=Path("kdcli-out/prune-zeros"))
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
