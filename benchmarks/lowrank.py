"""Question: what does factorising an encoder's matrices keep, by which method, at which size, and is it faster?

Runs `kdcli lowrank` once for every line of the plan below through the installed command, skips what is there, and
prints one Markdown table a data set. Nothing is trained, except in the line that says so.

    python benchmarks/lowrank.py run --data clinc150=DIR --data sst2=DIR --model clinc150=DIR --model sst2=DIR
    python benchmarks/lowrank.py run --lane 0/2 ...      # every second line; two processes share the cores
    python benchmarks/lowrank.py run --limit 1500 ...    # quality on 1,500 test rows
    python benchmarks/lowrank.py table --data ...        # onnxruntime alone too, and all latencies in one command
    python benchmarks/lowrank.py cost                    # seconds and memory for a BERT-base-shaped model

Defaults are chosen on validation rows and measured on test rows, in that order: `choose` factorises with every line of
CHOICES, judges all by onnxruntime alone on the validation split, and what is taken (the default, but for a clearly
better one), and no other, on the test split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import by_onnxruntime_alone, pairs, report_of

METHODS = ("svd", "fwsvd", "asvd", "whitening", "two-sided")
DEFAULT = "two-sided"

#: name -> options
PLAN: dict[str, list[str]] = {
    **{f"{method} 0.6": ["--method", method, "--budget", "0.6"] for method in METHODS},
    **{
        f"{method} {budget}": ["--method", method, "--budget", budget]
        for budget in ("0.8", "0.4")
        for method in ("svd", DEFAULT)
    },
    f"{DEFAULT} 0.6, one epoch": ["--budget", "0.6", "--epochs", "1"],
}

#: What the parts of the default are worth, and how its two numbers were chosen.
CHOICES: dict[str, list[str]] = {
    "whitening": ["--method", "whitening", "--set", "sequential=off"],
    "two-sided, not fitted": ["--set", "sequential=off"],
    "two-sided, fitted to its own weights": ["--set", "sequential=inputs"],
    **{
        f"two-sided, floor {floor}, ridge {ridge}": ["--set", f"floor={floor}", "--set", f"ridge={ridge}"]
        for floor, ridge in (
            *(("0.1", "0.3"), ("0.1", "0.001"), ("0.1", "0.03"), ("0.1", "3")),
            *(("0.01", "0.3"), ("1", "0.3")),
        )
    },
}

PRESENT = "two-sided, floor 0.1, ridge 0.3"
MATTERS = 0.95  # another choice is taken when its divergence is below so much of the present one's

TITLES = [
    *("", "accuracy", "loss", "onnxruntime alone", "parameters of the encoder", "model.onnx", "MACs"),
    *("p50 b1", "p50 b32", "share", "factorising"),
]


def place(out: Path, name: str, source: str) -> Path:
    return out / f"{name.replace(' ', '-').replace(',', '')}--{source}"


def run(given: argparse.Namespace) -> None:
    """Run every line that is not there yet."""
    data, models = pairs(given.data), pairs(given.model)
    limit = ["--limit", str(given.limit)] if given.limit else []
    lines = [
        (
            f"{name} {source}",
            place(given.out, name, source),
            [models[source], "--data", data[source], *PLAN[name], *limit],
        )
        for name in given.only or PLAN
        for source in data
    ]
    common.run_lines("lowrank", lines, given.lane)


def line(name: str, report: dict[str, Any], after: dict[str, Any], alone: float | None) -> str:
    detail = report["method"]["detail"]
    cells = [
        *(name, common.accuracy(report["after"])),
        f"{-100 * report['delta']['accuracy']:+.2f}",
        common.share(alone),
        f"{detail['parameters_after'] / 1e6:.2f} M ({100 * detail['parameters_kept']:.0f}%)",
        *measures(report["after"], after),
        detail.get("allocation", {}).get("chosen", ""),
        f"{report['timings']['apply']:.0f} s" + (" with training" if detail.get("recovery") else ""),
    ]
    return common.row(cells)


def measures(measured: dict[str, Any], timed: dict[str, Any]) -> list[str]:
    p50 = common.p50(timed)
    size = common.mib(measured["size"]["onnx_bytes"], 1)
    return [size, common.macs(measured, 1), f"{p50[1]:.2f} ms", f"{p50[32]:.1f} ms"]


def table(given: argparse.Namespace) -> None:
    """Print what is there."""
    data, models = pairs(given.data), pairs(given.model)
    for source in data:
        found = {
            name: report_of(where)
            for name in PLAN
            if (where := place(given.out, name, source)).joinpath("report.json").is_file()
        }
        if not found:
            continue
        fresh: dict[str, dict[str, Any]] = {}
        if given.latency:
            together = [models[source], *(place(given.out, name, source) for name in found)]
            measured = common.measured_together(together, "--data", data[source], "--limit", "100")
            fresh = dict(zip(["input", *found], measured, strict=True))
        first = next(iter(found.values()))
        before = first["before"]
        print(f"\n### {source}: {before['quality']['accuracy']['n']} test rows\n")
        print(common.header(TITLES))
        encoder = f"{first['method']['detail']['parameters_before'] / 1e6:.2f} M"
        dense = measures(before, fresh.get("input", before))
        print(common.row(["dense", common.accuracy(before), "", "", encoder, *dense, "", ""]))
        for name, report in found.items():
            test = Path(data[source]) / "test.csv"
            alone = by_onnxruntime_alone(place(given.out, name, source), test) if given.alone else None
            print(line(name, report, fresh.get(name, report["after"]), alone))


def choose(given: argparse.Namespace) -> None:
    """Print divergence and accuracy of every choice on validation, and the best one's accuracy on the test split."""
    data, models = pairs(given.data), pairs(given.model)
    for source in data:
        lines = [
            (
                f"{name} {source}",
                place(given.out, name, source),
                [models[source], "--data", data[source], "--budget", "0.6", "--limit", "64", *options],
            )
            for name, options in CHOICES.items()
        ]
        common.run_lines("lowrank", lines, given.lane)
        rows, labels = common.encode(Path(models[source]), Path(data[source]) / "validation.csv")
        truth = common.truth(Path(models[source]), labels)
        dense = dense_log_probabilities(Path(models[source]), rows)
        found = {}
        for name in CHOICES:
            graph = place(given.out, name, source) / "model.onnx"
            if graph.is_file():
                logits = common.logits(graph, rows)
                found[name] = divergence(dense, logits), float((logits.argmax(1) == truth).mean())
        best = min(found, key=lambda name: found[name][0])
        if found[best][0] > MATTERS * found.get(PRESENT, found[best])[0]:
            best = PRESENT
        print(f"\n### {source}: {len(rows)} validation rows, 60%\n")
        print(common.header(["", "divergence, nats a row", "accuracy", "accuracy on the test split"]))
        own = float((dense.argmax(1) == truth).mean())
        print(common.row(["dense", "", common.share(own), ""]))
        for name, (nats, accuracy) in found.items():
            test = ""
            if name == best:
                alone = by_onnxruntime_alone(place(given.out, name, source), Path(data[source]) / "test.csv")
                test = common.share(alone)
            print(common.row([name, f"{nats:.4f}", common.share(accuracy), test]))


def dense_log_probabilities(model: Path, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
    """log p (N, C) of a checkpoint, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        made = [loaded(**{k: torch.from_numpy(v) for k, v in row.items()}).logits for row in rows]
        found: np.ndarray = torch.cat(made).log_softmax(-1).numpy()
    return found


def divergence(dense: np.ndarray, logits: np.ndarray) -> float:
    """KL(dense || factorised), mean over the rows: log p (N, C) and logits (N, C)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    log_q = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return float((np.exp(dense) * (dense - log_q)).sum(1).mean())


def cost(given: argparse.Namespace) -> None:
    """Factorise a BERT-base-shaped model with random weights and report seconds and memory."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    data, models = pairs(given.data), pairs(given.model)
    source = next(iter(data))
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "bert-base-shaped"
        config = AutoConfig.from_pretrained(models[source])
        config.update({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12})
        config.update({"intermediate_size": 3072, "dtype": "float32"})
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(models[source]).save_pretrained(made)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        del model
        words = [str(made), "--data", data[source], "--limit", "50", "--budget", "0.6"]
        peaks, seconds = common.sampled("lowrank", *words, "-o", str(Path(temporary) / "out"))
        report = report_of(Path(temporary) / "out")
        peak = max(peaks.values())
        print(
            f"apply {report['timings']['apply']:.0f} s, whole command {seconds:.0f} s, "
            f"peak {peak / 2**20:.0f} MiB, {peak / size:.2f} times the model's {size / 2**20:.0f} MiB\n"
            f"MiB by phase: {common.by_phase(peaks)}"
        )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("action", choices=["run", "table", "choose", "cost"])
    common.named(parser, "data", "model")
    parser.add_argument("--out", type=Path, default=Path("kdcli-out/lowrank"))
    common.lane(parser)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--only", action="append", choices=list(PLAN))
    parser.add_argument("--latency", action="store_true", help="time all models again, in turns")
    parser.add_argument("--alone", action="store_true", help="judge with onnxruntime and the tokenizer alone")
    given = parser.parse_args()
    {"run": run, "table": table, "choose": choose, "cost": cost}[given.action](given)


if __name__ == "__main__":
    main()
