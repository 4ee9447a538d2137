"""Question: what does the whole pipeline keep, and what does each stage cost?

Runs distill, prune, quantize and lowrank (on the student) through the installed command, on any data and
teacher, measures all of them together, judges every output with onnxruntime and the tokenizer alone, and prints
one Markdown table.

    python benchmarks/pipeline.py --data DIR --teacher DIR --out out/bench
    python benchmarks/pipeline.py            # the demo's own model and sentences
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def kdcli(*words: str) -> str:
    """Run one command of the installed kdcli and return its stdout; anything but exit 0 stops the benchmark."""
    command = [sys.executable, "-m", "kdcli", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def by_onnxruntime_alone(directory: Path, file: Path) -> float:
    """Accuracy of model.onnx with onnxruntime and tokenizers, one row at a time, without kdcli."""
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = config["id2label"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(config.get("max_position_embeddings", 512))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {i.name for i in session.get_inputs()}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    right = 0
    for row in rows:
        e = tokenizer.encode(row["text"])
        feed = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        given = {name: np.array([feed[name]], dtype=np.int64) for name in inputs}
        right += names[str(int(session.run(None, given)[0].argmax()))] == row["label"]
    return right / len(rows)


def line(name: str, measured: dict[str, Any], seconds: float | None, alone: float | None) -> str:
    accuracy, size = measured["quality"]["accuracy"], measured["size"]
    p50 = {entry["batch"]: entry["p50_ms"] for entry in measured["latency"]}
    cells = [
        name,
        f"{100 * accuracy['value']:.2f} ± {100 * accuracy['stderr']:.2f}",
        "" if alone is None else f"{100 * alone:.2f}",
        f"{size['parameters'] / 1e6:.2f} M",
        f"{size['onnx_bytes'] / 2**20:.2f} MiB",
        f"{measured['compute']['macs'] / 1e6:.2f} M",
        f"{p50[1]:.3f} ms",
        f"{p50[32]:.2f} ms",
        "" if seconds is None else f"{seconds:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--student", default="tiny")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=Path("kdcli-out/bench"))
    parser.add_argument("--sparsity", default="0.3")
    parser.add_argument("--budget", default="0.8")
    parser.add_argument("--epochs")
    parser.add_argument(
        "--judge-only", action="store_true", help="measure the outputs of an earlier run again"
    )
    given = parser.parse_args()
    data = ["--data", given.data] if given.data else []
    epochs = ["--epochs", given.epochs] if given.epochs else []
    out: Path = given.out
    student, pruned, thin, small = (str(out / n) for n in ("student", "pruned", "lowrank", "int8"))
    if not given.judge_only:
        words = ["--teacher", given.teacher, "--student", given.student, *data, *epochs]
        kdcli("distill", *words, "-o", student, "-f")
        kdcli("prune", student, "--sparsity", given.sparsity, "-o", pruned, "-f")
        kdcli("lowrank", student, "--budget", given.budget, "-o", thin, "-f")
        kdcli("quantize", pruned, "-o", small, "-f")
    # One command for all of them, so that every latency comes from the same alternating rounds.
    models = [student, pruned, thin, small]
    first = json.loads((out / "student" / "report.json").read_text(encoding="utf-8"))
    fine_tuned = first["method"]["detail"]["teacher"].get("path", given.teacher)
    reports = json.loads(kdcli("evaluate", fine_tuned, *models, *data, "--json"))
    test = Path(given.data) / "test.csv" if given.data else None
    titles = [
        "",
        "accuracy",
        "onnxruntime alone",
        "parameters",
        "model.onnx",
        "MACs",
        "p50 b1",
        "p50 b32",
        "took",
    ]
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    print(line("teacher", reports[0]["after"], None, None))
    for path, report in zip(models, reports[1:], strict=True):
        own = json.loads((Path(path) / "report.json").read_text(encoding="utf-8"))
        alone = by_onnxruntime_alone(Path(path), test) if test is not None and test.is_file() else None
        print(line(Path(path).name, report["after"], sum(own["timings"].values()), alone))


if __name__ == "__main__":
    main()
