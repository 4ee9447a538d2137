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
import statistics
from pathlib import Path
from typing import Any

import common
from common import by_onnxruntime_alone, header, mean, pairs, reports

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
    lines = [
        (
            f"{name} {source} seed {seed}",
            given.out / f"{name}--{source}--{seed}",
            ["--teacher", teachers[source], "--data", data[source], "--seed", str(seed), *options],
        )
        for group in given.groups
        for name, sources, seeds, options in PLAN[group]
        for source in sources
        for seed in seeds
    ]
    common.run_lines("distill", lines, given.lane)


def table(given: argparse.Namespace) -> None:
    """Print every group that has results."""
    everything = reports(given.out)
    fresh: dict[Path, dict[str, Any]] = {}
    data, teachers = pairs(given.data), pairs(given.teacher)
    if given.latency:
        for source in data:
            models = [
                by_seed[0]["path"]
                for (_, one), by_seed in everything.items()
                if one == source and 0 in by_seed
            ]
            teacher, *measured = common.measured_together([teachers[source], *models], "--data", data[source])
            fresh |= dict(zip(models, measured, strict=True))
            title = f"teacher {source}"
            print(line(title, [teacher["quality"]["accuracy"]["value"]], [], teacher, None, None))
    for group, lines in PLAN.items():
        printed = False
        for name, sources, _, _ in lines:
            for source in sources:
                by_seed = everything.get((name, source))
                if not by_seed:
                    continue
                if not printed:
                    print(f"\n## {group}\n\n{header(TITLES)}")
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
    p50 = common.p50(after)
    gain = f"{100 * (statistics.mean(distilled) - statistics.mean(controls)):+.2f}" if controls else ""
    detail = {} if report is None else report["method"]["detail"]
    cells = [
        title,
        mean(distilled),
        mean(controls) if controls else "",
        gain,
        common.share(alone),
        common.parameters(after),
        common.mib(after["size"]["onnx_bytes"]),
        common.macs(after),
        f"{p50.get(1, 0):.3f} ms",
        f"{p50.get(32, 0):.2f} ms",
        f"{detail['training']['seconds']:.0f} s" if detail else "",
        f"{detail['rows']['augmented']:,}" if "rows" in detail else "",
    ]
    return common.row(cells)


def main() -> None:
    parser = common.parser(__doc__)
    running, showing = common.commands(parser, run, table)
    running.add_argument("groups", nargs="+", choices=PLAN)
    common.lane(running)
    showing.add_argument("--latency", action="store_true")
    for command in (running, showing):
        common.named(command, "data", "teacher")
        command.add_argument("--out", type=Path, default=Path("kdcli-out/distill"))
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
