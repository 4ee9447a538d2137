"""Questions: does calibration need more memory for more rows, and how much does a large model need?

Two tables. "rows": the given model is quantised with ranges from 100, 1,000 and 10,000 calibration rows (the given
sentences with their words shuffled). "model": a BERT of 12 layers of 768 with random weights (110 million
parameters) is quantised.

    OMP_NUM_THREADS=2 python benchmarks/quantize_memory.py --data DIR --model MODEL [--only rows|model] [--scheme NAME]

The command runs in a process of its own whose anonymous memory is sampled (RssAnon in /proc/PID/status and of its
children, so Linux only), phase by phase. Memory-mapped files do not count: the system takes them back when it needs
the space. "libraries" is what the process has before it loads a model.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

MEASURED = 64  # rows of validation and test: their answers do not matter here
MIB = 2**20


def read(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


def write(directory: Path, given: Path, rows: int) -> Path:
    """A data set of as many training rows, and few others."""
    directory.mkdir()
    draw = random.Random(0)
    source = read(given / "train.csv")
    train = []
    for i in range(rows):
        text, label = source[i * len(source) // rows if rows < len(source) else i % len(source)]
        words = text.split()
        draw.shuffle(words)
        train.append((" ".join(words), label))
    parts = {"train": train}
    known = {label for _, label in train}
    for name in ("validation", "test"):
        found = [row for row in read(given / f"{name}.csv") if row[1] in known]
        parts[name] = [found[i * len(found) // MEASURED] for i in range(MEASURED)]
    for name, part in parts.items():
        with (directory / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label"))
            writer.writerows(part)
    return directory


def large(directory: Path, tokenizer: Path) -> tuple[Path, int]:
    """A BERT-base with random weights and the labels of the given model; and its bytes in fp32."""
    code = (
        "import sys, torch;"
        "from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification as B;"
        "old = AutoConfig.from_pretrained(sys.argv[2]); torch.manual_seed(0);"
        "new = BertConfig(id2label=old.id2label, label2id=old.label2id, vocab_size=old.vocab_size);"
        "model = B(new); model.save_pretrained(sys.argv[1]);"
        "AutoTokenizer.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[1]);"
        "print(4 * sum(p.numel() for p in model.parameters()))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(directory), str(tokenizer)],
        check=True,
        capture_output=True,
        text=True,
    )
    return directory, int(made.stdout.split()[-1])


def quantize(model: Path, data: Path, scheme: str, calibration: int, work: Path) -> dict[str, Any]:
    """Run ``kdcli quantize``; peaks of memory by phase, and its seconds."""
    words = [str(model), "--data", str(data), "--scheme", scheme, "--calibration-samples", str(calibration)]
    peaks, seconds = common.sampled(
        "quantize", *words, "--out", str(work / "out"), "--force", cache=work / "cache"
    )
    return {
        "seconds": seconds,
        "apply_seconds": common.report_of(work / "out")["timings"].get("apply"),
        "phases_mib": {name: round(peak / MIB, 1) for name, peak in peaks.items()},
        "peak_mib": round(max(peaks.values()) / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with train, validation and test.csv"
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", choices=("rows", "model"))
    parser.add_argument("--scheme", action="append", help="of both tables; repeatable")
    parser.add_argument("--rows", default="100,1000,10000")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"rows": [], "model": []}
    with tempfile.TemporaryDirectory(prefix="kdcli-memory-") as folder:
        work = Path(folder)
        if given.only != "model":
            titles = ("scheme", "calibration rows", "quantize phase, MiB", "overall, MiB", "quantising, s")
            print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
            data = write(work / "many", given.data, max(int(n) for n in given.rows.split(",")))
            for scheme in given.scheme or ("static-int8", "int4"):
                for rows in (int(n) for n in given.rows.split(",")):
                    one = quantize(given.model, data, scheme, rows, work)
                    found["rows"].append({"scheme": scheme, "rows": rows, **one})
                    phase = one["phases_mib"].get("quantize", 0.0)
                    print(
                        f"| {scheme} | {rows:,} | {phase:.0f} | {one['peak_mib']:.0f} | {one['apply_seconds']:.1f} |",
                        flush=True,
                    )
        if given.only != "rows":
            few = write(work / "few", given.data, 256)
            model, size = large(work / "large", given.model)
            print("\n| scheme | fp32, MiB | peak, MiB | times fp32 | by phase, MiB |\n|---|---|---|---|---|")
            for scheme in given.scheme or ("dynamic-int8", "int4"):
                one = quantize(model, few, scheme, 128, work)
                found["model"].append({"scheme": scheme, "fp32_mib": size / MIB, **one})
                times = one["peak_mib"] * MIB / size
                shown = ", ".join(f"{name} {peak:.0f}" for name, peak in one["phases_mib"].items())
                print(
                    f"| {scheme} | {size / MIB:.0f} | {one['peak_mib']:.0f} | {times:.2f} | {shown} |",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
