"""Question: how much does a student gain from its teacher, and from which method, strategy and student?

Runs `kdcli distill` once for every line of the plan below through the installed command, skips what is there, and
prints Markdown tables. Every line says what it changes against the default recipe; `headline` and `labels` also
train the control, the same student on the same labelled rows for as many steps without the teacher.

    python benchmarks/distill.py run headline --data clinc150=DIR --data sst2=DIR --teacher clinc150=DIR ...
    python benchmarks/distill.py run methods --lane 0/2 ...     # every second line; two processes share the cores
    python benchmarks/distill.py table --out kdcli-out/distill

Latencies of runs that shared a machine are not comparable: `table --latency` measures all students again, together
and alone on the machine, and judges each with onnxruntime and the tokenizer alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import by_onnxruntime_alone, kdcli

SHORT = ["--augment", "0", "--epochs", "6", "--set", "phases=one"]  # for comparing methods: the rows alone


TITLES = [
    *("student", "data", "distilled", "control", "gain", "onnxruntime alone", "parameters", "model.onnx"),
    *("MACs", "p50 b1", "p50 b32", "training", "further texts"),
]


def with_method(name: str, *more: str) -> list[str]:
    return ["--method", "response", "--method", name, *more]


#: group -> (name, data sets, seeds, options)
PLAN: dict[str, list[tuple[str, tuple[str, ...], tuple[int, ...], list[str]]]] = {
    "headline": [
        ("tiny", ("clinc150", "sst2"), (0, 1, 2), ["--student", "tiny", "--control"]),
        ("static", ("clinc150", "sst2"), (0, 1, 2), ["--student", "static", "--control"]),
    ],
    "labels": [
        (
            "tiny-labels-1000",
            ("clinc150", "sst2"),
            (0,),
            ["--student", "tiny", "--labels", "1000", "--control"],
        ),
    ],
    "students": [
        ("cnn", ("clinc150",), (0,), ["--student", "cnn", "--set", "phases=one"]),
        ("bilstm", ("clinc150",), (0,), ["--student", "bilstm", "--set", "phases=one", "--epochs", "2"]),
        ("mini", ("clinc150",), (0,), ["--student", "mini", "--set", "phases=one", "--epochs", "2"]),
    ],
    "ablation": [
        (name, ("clinc150",), (0,), ["--student", "tiny", *options])
        for name, options in {
            "rows-alone": SHORT,
            "textbook": [*SHORT, "--temperature", "4", "--alpha", "0.9", "--init", "random"],
            "random-init": [*SHORT, "--init", "random"],
            "alpha-1": [*SHORT, "--alpha", "1"],
            "temperature-2": [*SHORT, "--temperature", "2"],
            "two-phases": [*SHORT[:-1], "phases=two"],
        }.items()
    ],
    "methods": [
        (
            f"method-{name}",
            ("clinc150",),
            (0,),
            ["--student", "tiny", "--set", "phases=one", *SHORT, *options],
        )
        for name, options in {
            "logit-mse": ["--method", "logit-mse"],
            "dkd": ["--method", "dkd"],
            "dist": ["--method", "dist"],
            "logit-standardisation": ["--method", "logit-standardisation"],
            **{
                name: with_method(name)
                for name in (
                    *("hidden", "pooled", "pkd", "tinybert", "attention-transfer", "minilm"),
                    *("similarity", "similarity-preserving", "rkd", "pkt", "adversarial"),
                )
            },
        }.items()
    ],
    "strategies": [
        (f"strategy-{name}", ("clinc150",), (0,), ["--student", "tiny", *SHORT, *options])
        for name, options in {
            "layerwise": [
                *["--strategy", "layerwise", "--set", "layer_epochs=1", "--set", "distill_ensemble=true"],
            ],
            "online-peers": ["--strategy", "online"],
            "online-teacher": ["--strategy", "online", "--set", "online=teacher"],
            "assistant-chain": ["--strategy", "assistant-chain", "--set", "assistants=3x192"],
            "self": ["--strategy", "self"],
        }.items()
    ],
}


def run(given: argparse.Namespace) -> None:
    """Run every line of the chosen groups that is not there yet."""
    data, teachers = pairs(given.data), pairs(given.teacher)
    number, lanes = (int(part) for part in given.lane.split("/"))
    lines = [
        (name, source, seed, options)
        for group in given.groups
        for name, sources, seeds, options in PLAN[group]
        for source in sources
        for seed in seeds
    ]
    for name, source, seed, options in lines[number::lanes]:
        out = given.out / f"{name}--{source}--{seed}"
        if (out / "report.json").is_file():
            continue
        words = ["--teacher", teachers[source], "--data", data[source], "--seed", str(seed)]
        print(f"{name} {source} seed {seed}", file=sys.stderr, flush=True)
        try:
            kdcli("distill", *words, *options, "-o", str(out))
        except subprocess.CalledProcessError as error:
            print(f"  failed with exit code {error.returncode}", file=sys.stderr, flush=True)


def pairs(given: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in given)


def reports(out: Path) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """(name, data) -> seed -> report."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("*--*--*/report.json")):
        name, source, seed = path.parent.name.split("--")
        report = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((name, source), {})[int(seed)] = report | {"path": path.parent}
    return found


def mean(values: list[float]) -> str:
    """Mean and spread (standard deviation over seeds) in per cent."""
    shown = f"{100 * statistics.mean(values):.2f}"
    return shown + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(given: argparse.Namespace) -> None:
    """Print every group that has results."""
    everything = reports(given.out)
    fresh: dict[Path, dict[str, Any]] = {}
    data, teachers = pairs(given.data), pairs(given.teacher)
    if given.latency:
        for source in data:
            models = [
                str(by_seed[0]["path"])
                for (_, one), by_seed in everything.items()
                if one == source and 0 in by_seed
            ]
            measured = json.loads(
                kdcli("evaluate", teachers[source], *models, "--data", data[source], "--json")
            )
            for path, report in zip([teachers[source], *models], measured, strict=True):
                fresh[Path(path)] = report["after"]
            print(
                line(
                    f"teacher {source}",
                    [measured[0]["after"]["quality"]["accuracy"]["value"]],
                    [],
                    measured[0]["after"],
                    None,
                    None,
                )
            )
    for group, lines in PLAN.items():
        printed = False
        for name, sources, _, _ in lines:
            for source in sources:
                by_seed = everything.get((name, source))
                if not by_seed:
                    continue
                if not printed:
                    print(f"\n## {group}\n")
                    print("| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
                    printed = True
                some = next(iter(by_seed.values()))
                after = fresh.get(some["path"], some["after"])
                alone = None
                if given.latency and source in data:
                    alone = by_onnxruntime_alone(some["path"], Path(data[source]) / "test.csv")
                distilled = [r["after"]["quality"]["accuracy"]["value"] for r in by_seed.values()]
                controls = [
                    r["method"]["detail"]["control"]["accuracy"]
                    for r in by_seed.values()
                    if "control" in r["method"]["detail"]
                ]
                print(line(f"{name} | {source}", distilled, controls, after, some, alone))


def line(
    title: str,
    distilled: list[float],
    controls: list[float],
    after: dict[str, Any],
    report: dict[str, Any] | None,
    alone: float | None,
) -> str:
    p50 = {entry["batch"]: entry["p50_ms"] for entry in after["latency"]}
    gain = f"{100 * (statistics.mean(distilled) - statistics.mean(controls)):+.2f}" if controls else ""
    detail = {} if report is None else report["method"]["detail"]
    cells = [
        title,
        mean(distilled),
        mean(controls) if controls else "",
        gain,
        "" if alone is None else f"{100 * alone:.2f}",
        f"{after['size']['parameters'] / 1e6:.2f} M",
        f"{after['size']['onnx_bytes'] / 2**20:.2f} MiB",
        f"{after['compute']['macs'] / 1e6:.2f} M",
        f"{p50.get(1, 0):.3f} ms",
        f"{p50.get(32, 0):.2f} ms",
        f"{detail['training']['seconds']:.0f} s" if detail else "",
        f"{detail['rows']['augmented']:,}" if "rows" in detail else "",
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
            command.add_argument("groups", nargs="+", choices=PLAN)
            command.add_argument("--lane", default="0/1", help="K/N: every N-th line, from the K-th")
        else:
            command.add_argument("--latency", action="store_true")
        command.add_argument("--data", action="append", default=[], metavar="NAME=DIR")
        command.add_argument("--teacher", action="append", default=[], metavar="NAME=DIR")
        command.add_argument("--out", type=Path, default=Path("kdcli-out/distill"))
        command.set_defaults(function=function)
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
