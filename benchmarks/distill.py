"""Question: how much does a student gain from its teacher, and from which method, strategy and student?

Runs `kdcli distill` once for every line of the plan below through the installed command, skips what is there, and
prints Markdown tables. Every line says what it changes against the default recipe; `headline` and `labels` also
train the controls, the same student from the same first weights for as many steps without the teacher: on the labels
alone, with the same extra texts, and with dropout where the student has none.

    python benchmarks/distill.py run headline --data clinc150=DIR --data sst2=DIR --teacher clinc150=DIR ...
    python benchmarks/distill.py run methods --lane 0/2 ...     # every second line; two processes share the cores
    python benchmarks/distill.py table --out kdcli-out/distill

Defaults are chosen on validation rows and measured on test rows, in that order: `choose` shows the lines of every
question by their validation accuracy, takes the default unless another one is better by more than a standard error,
and measures what it took, and no other, on the test split.

    python benchmarks/distill.py run choices ...
    python benchmarks/distill.py choose --out kdcli-out/distill

Latencies of runs that shared a machine are not comparable: `table --latency` measures all students again, together
and alone on the machine, and judges each with onnxruntime and the tokenizer alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import common
from common import by_onnxruntime_alone, header, mean, pairs, reports

SHORT = ["--augment", "0", "--epochs", "6", "--set", "phases=one"]  # for comparing methods: the rows alone


CONTROLS = ("labels", "labels+texts", "labels+texts+dropout")

TITLES = [
    *(
        "student | data",
        "distilled",
        "labels alone",
        "labels, texts",
        "labels, texts, dropout",
        "gain over the best",
    ),
    *(
        "onnxruntime alone",
        "parameters",
        "model.onnx",
        "MACs",
        "p50 b1",
        "p50 b32",
        "training",
        "extra texts",
    ),
]


def with_method(name: str, *more: str) -> list[str]:
    return ["--method", "response", "--method", name, *more]


def weighed(method: str, *weights: str) -> dict[str, list[str]]:
    """A line for every weight of a method."""
    return {
        f"{method}-weight-{weight}": [*with_method(method), "--weight", f"{method}={weight}"]
        for weight in weights
    }


#: A question -> its lines, the default first. Short runs, measured on few test rows, because none of them counts.
CHOICES: dict[str, dict[str, list[str]]] = {
    "weight of `hidden`": weighed("hidden", "0.01", "0.1", "1"),
    "weight of `tinybert`": weighed("tinybert", "0.001", "0.01", "0.1", "1"),
    "weight of `attention-transfer`": weighed("attention-transfer", "0.02", "0.1", "1"),
    "temperature and alpha of `response`": {
        f"temperature-{t}-alpha-{a}": ["--temperature", t, "--alpha", a]
        for t in ("1", "2", "4")
        for a in ("0.5", "0.9", "1")
    },
    "first weights": {"temperature-1-alpha-0.5": [], "init-random": ["--init", "random"]},
}

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
    "choices": [
        (name, ("clinc150",), (0,), ["--student", "tiny", *SHORT, "--limit", "64", *options])
        for name, options in {n: o for lines in CHOICES.values() for n, o in lines.items()}.items()
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
                    r["method"]["detail"]["control"]
                    for r in by_seed.values()
                    if "control" in r["method"]["detail"]
                ]
                print(line(f"{name} | {source}", distilled, controls, after, some, alone))


def choose(given: argparse.Namespace) -> None:
    """Print what the validation rows say to every question, and the answer's accuracy on the test split."""
    found = {name: by_seed[0] for (name, _), by_seed in reports(given.out).items() if 0 in by_seed}
    print(header(["question", "answer", "validation", "test"]))
    for question, lines in CHOICES.items():
        judged = {name: chosen_by(found[name]) for name in lines if name in found}
        taken = answer_of(judged, rows_of(found[next(iter(judged))])) if judged else None
        for name, accuracy in judged.items():
            test = ""
            if name == taken:
                whole = common.measured_together([found[name]["path"]], "--split", "test")[0]
                test = common.accuracy(whole)
            shown = f"**{name}**" if name == taken else name
            print(common.row([question, shown, common.share(accuracy), test]))


def answer_of(judged: dict[str, float], rows: int) -> str:
    """The first name, which is the default, unless the best one is better by more than a standard error."""
    default, best = next(iter(judged)), max(judged, key=lambda name: judged[name])
    error = math.sqrt(judged[default] * (1 - judged[default]) / rows)
    return best if judged[best] - judged[default] > error else default


def rows_of(report: dict[str, Any]) -> int:
    """How many rows chose."""
    return int(report["data"]["rows"]["validation"])


def chosen_by(report: dict[str, Any]) -> float:
    """Accuracy of a training's best epoch on the rows that chose it, which are not those of the test."""
    return float(report["method"]["detail"]["training"]["best_accuracy"])


def line(
    title: str,
    distilled: list[float],
    controls: list[dict[str, Any]],
    after: dict[str, Any],
    report: dict[str, Any] | None,
    alone: float | None,
) -> str:
    p50 = common.p50(after)
    gain = p_values = ""
    if controls:
        best = [one["accuracy"] for one in controls]
        gain = f"{100 * (statistics.mean(distilled) - statistics.mean(best)):+.2f}"
        p_values = ", ".join(f"{max(of_best(one)['p_value'], 1e-4):.1g}" for one in controls)
    detail = {} if report is None else report["method"]["detail"]
    cells = [
        title,
        mean(distilled),
        *(mean(named(controls, name)) if named(controls, name) else "" for name in CONTROLS),
        gain,
        p_values,
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


def named(controls: list[dict[str, Any]], name: str) -> list[float]:
    """Accuracies of one control over the seeds."""
    return [run["accuracy"] for one in controls for run in one["runs"] if run["name"] == name]


def of_best(one: dict[str, Any]) -> dict[str, Any]:
    """The best of a run's controls."""
    return next(run for run in one["runs"] if run["name"] == one["best"])


def main() -> None:
    parser = common.parser(__doc__)
    running, showing, choosing = common.commands(parser, run, table, choose)
    running.add_argument("groups", nargs="+", choices=PLAN)
    common.lane(running)
    showing.add_argument("--latency", action="store_true")
    for command in (running, showing):
        common.named(command, "data", "teacher")
    for command in (running, showing, choosing):
        command.add_argument("--out", type=Path, default=Path("kdcli-out/distill"))
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
