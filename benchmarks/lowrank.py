"""Question: what does factorising an encoder's matrices keep, by which method, at which size, and is it faster?

Runs `kdcli lowrank` once for every line of the plan below through the installed command, skips what is there, and
prints one Markdown table a data set. Nothing is trained, except in the line that says so.

    python benchmarks/lowrank.py run --data clinc150=DIR --data sst2=DIR --model clinc150=DIR --model sst2=DIR
    python benchmarks/lowrank.py run --lane 0/2 ...      # every second line; two processes share the cores
    python benchmarks/lowrank.py run --limit 1500 ...    # quality on 1,500 test rows
    python benchmarks/lowrank.py table --data ...        # onnxruntime alone too, and all latencies in one command
    python benchmarks/lowrank.py cost                    # seconds and memory for a BERT-base-shaped model
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import by_onnxruntime_alone, kdcli

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

TITLES = [
    *("", "accuracy", "loss", "onnxruntime alone", "parameters of the encoder", "model.onnx", "MACs"),
    *("p50 b1", "p50 b32", "share", "factorising"),
]


def pairs(given: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in given)


def place(out: Path, name: str, source: str) -> Path:
    return out / f"{name.replace(' ', '-').replace(',', '')}--{source}"


def run(given: argparse.Namespace) -> None:
    """Run every line that is not there yet."""
    data, models = pairs(given.data), pairs(given.model)
    number, lanes = (int(part) for part in given.lane.split("/"))
    lines = [(name, source) for name in given.only or PLAN for source in data]
    limit = ["--limit", str(given.limit)] if given.limit else []
    for name, source in lines[number::lanes]:
        out = place(given.out, name, source)
        if (out / "report.json").is_file():
            continue
        print(f"{name} {source}", file=sys.stderr, flush=True)
        try:
            kdcli("lowrank", models[source], "--data", data[source], *PLAN[name], *limit, "-o", str(out))
        except subprocess.CalledProcessError as error:
            print(f"  failed with exit code {error.returncode}", file=sys.stderr, flush=True)


def line(name: str, report: dict[str, Any], latency: dict[int, float], alone: float | None) -> str:
    accuracy, size = report["after"]["quality"]["accuracy"], report["after"]["size"]
    detail = report["method"]["detail"]
    recovery = detail.get("recovery")
    cells = [
        name,
        f"{100 * accuracy['value']:.2f} ± {100 * accuracy['stderr']:.2f}",
        f"{-100 * report['delta']['accuracy']:+.2f}",
        "" if alone is None else f"{100 * alone:.2f}",
        f"{detail['parameters_after'] / 1e6:.2f} M ({100 * detail['parameters_kept']:.0f}%)",
        f"{size['onnx_bytes'] / 2**20:.1f} MiB",
        f"{report['after']['compute']['macs'] / 1e6:.1f} M",
        f"{latency[1]:.2f} ms",
        f"{latency[32]:.1f} ms",
        detail.get("allocation", {}).get("chosen", ""),
        f"{report['timings']['apply']:.0f} s" + (" with training" if recovery else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def table(given: argparse.Namespace) -> None:
    """Print what is there."""
    data, models = pairs(given.data), pairs(given.model)
    for source in data:
        found = {
            name: json.loads((where / "report.json").read_text(encoding="utf-8"))
            for name in PLAN
            if (where := place(given.out, name, source)).joinpath("report.json").is_file()
        }
        if not found:
            continue
        latencies = {}
        if given.latency:
            names = [str(place(given.out, name, source)) for name in found]
            words = [models[source], *names, "--data", data[source], "--limit", "100", "--json"]
            together = json.loads(kdcli("evaluate", *words))
            latencies = dict(zip(["input", *found], together, strict=True))
        first = next(iter(found.values()))
        before = first["before"]
        print(f"\n### {source}: {before['quality']['accuracy']['n']} test rows\n")
        print("| " + " | ".join(TITLES) + " |")
        print("|---" * len(TITLES) + "|")
        accuracy = before["quality"]["accuracy"]
        p50 = of(latencies.get("input", first | {"after": before}))
        cells = [
            *("dense", f"{100 * accuracy['value']:.2f} ± {100 * accuracy['stderr']:.2f}", "", ""),
            f"{first['method']['detail']['parameters_before'] / 1e6:.2f} M",
            f"{before['size']['onnx_bytes'] / 2**20:.1f} MiB",
            f"{before['compute']['macs'] / 1e6:.1f} M",
            *(f"{p50[1]:.2f} ms", f"{p50[32]:.1f} ms", "", ""),
        ]
        print("| " + " | ".join(cells) + " |")
        for name, report in found.items():
            test = Path(data[source]) / "test.csv"
            alone = by_onnxruntime_alone(place(given.out, name, source), test) if given.alone else None
            print(line(name, report, of(latencies.get(name, report)), alone))


def of(report: dict[str, Any]) -> dict[int, float]:
    """Batch size -> p50 in ms."""
    return {entry["batch"]: entry["p50_ms"] for entry in report["after"]["latency"]}


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
        started = time.monotonic()
        command = [sys.executable, "-m", "kdcli", "lowrank", *words, "-o", str(Path(temporary) / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.2)
        report = json.loads((Path(temporary) / "out" / "report.json").read_text(encoding="utf-8"))
        print(
            f"apply {report['timings']['apply']:.0f} s, whole command {time.monotonic() - started:.0f} s, "
            f"peak {peak / 2**20:.0f} MiB, {peak / size:.2f} times the model's {size / 2**20:.0f} MiB"
        )


def anonymous(pid: int) -> int:
    """Memory of a process that is no file, in bytes; Linux only."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return sum(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table", "cost"])
    parser.add_argument("--data", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--out", type=Path, default=Path("kdcli-out/lowrank"))
    parser.add_argument("--lane", default="0/1")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--only", action="append", choices=list(PLAN))
    parser.add_argument("--latency", action="store_true", help="time all models again, in turns")
    parser.add_argument("--alone", action="store_true", help="judge with onnxruntime and the tokenizer alone")
    given = parser.parse_args()
    {"run": run, "table": table, "cost": cost}[given.action](given)


if __name__ == "__main__":
    main()
