"""Question: how does the memory of a distillation grow with the training rows?

Distils the same `tiny` student for one epoch from 10,000 and from 100,000 rows with the installed command, and
samples the anonymous memory of its process (RssAnon in /proc/PID/status, so Linux only). Memory-mapped files, such
as the teacher's outputs, do not count: the system takes them back when it needs the space. The rows are the given
sentences with their words shuffled; the teacher is a small one (2 layers of 128) that kdcli first makes from
--teacher, so that the teacher's pass does not take most of the time.

    OMP_NUM_THREADS=2 python benchmarks/distill_memory.py --data DIR --teacher MODEL

"reading" is the peak before the first measurement: the file is read and tokenised. "training" is the peak of the
teacher's pass and of the training, "overall" that of the whole command. "tokenised text" is 5 bytes a token (its id
and its segment) and 16 a row (its place and its label); "strings" are the Python strings of texts and labels with
the references to them.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

START, TRAINING = "start", "distill"  # phases: before kdcli names one, and teacher's pass and training
SMALL = 1500  # training rows of the small teacher; its answers do not matter here
MEASURED = 500  # rows of validation and test
MIB = 2**20

Row = tuple[str, str]  # text, label


def read(file: Path) -> list[Row]:
    with file.open(newline="", encoding="utf-8") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


def spread(rows: list[Row], count: int) -> list[Row]:
    """``count`` rows at equal distances, so that a file sorted by label gives all of its labels."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows


def shuffled(rows: list[Row], count: int) -> list[Row]:
    """``count`` rows: the given ones again and again, each time with their words in another order."""
    draw = random.Random(0)
    few = spread(rows, count)
    made = []
    for i in range(count):
        text, label = few[i % len(few)]
        words = text.split()
        draw.shuffle(words)
        made.append((" ".join(words), label))
    draw.shuffle(made)
    return made


def write(directory: Path, given: Path, train: list[Row]) -> None:
    directory.mkdir()
    parts = {name: spread(read(given / f"{name}.csv"), MEASURED) for name in ("validation", "test")}
    for name, rows in (parts | {"train": train}).items():
        with (directory / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label"))
            writer.writerows(rows)


def strings(rows: list[Row]) -> int:
    """Bytes of the texts and labels of all rows as Python keeps them, with one reference to each."""
    return sum(sys.getsizeof(text) + sys.getsizeof(label) + 16 for text, label in rows)


def distill(cache: Path, out: Path, *words: str) -> tuple[dict[str, Any], dict[str, int], float]:
    """Run ``kdcli distill``; its report, the peak of anonymous memory by phase, and its seconds."""
    options = [*words, "--student", "tiny", "--init", "teacher"]
    options += ["--method", "response", "--strategy", "teacher-assisted", "--augment", "0", "--epochs", "1"]
    options += ["--batch-size", "64", "--lr", "2e-3", "--alpha", "0.5", "--temperature", "2", "--seed", "0"]
    options += ["--set", "dropout=0", "--set", "phases=one", "--device", "cpu", "--out", str(out)]
    peaks, seconds = common.sampled("distill", *options, cache=cache)
    if TRAINING not in peaks:
        sys.exit(f"kdcli named no phase '{TRAINING}', but {', '.join(peaks)}")
    return common.report_of(out), peaks, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="train.csv, validation.csv, test.csv")
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--as-is", action="store_true", help="train from --teacher itself")
    given = parser.parse_args()
    sentences = read(given.data / "train.csv")
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="kdcli-memory-") as temporary:
        place = Path(temporary)
        teacher: str = given.teacher
        if not given.as_is:
            print("making a small teacher ...", file=sys.stderr, flush=True)
            write(place / "few", given.data, spread(sentences, SMALL))
            out = place / "teacher"
            words = ("--teacher", teacher, "--data", str(place / "few"), "--set", "teacher_epochs=1")
            distill(place / "cache-0", out, *words)
            teacher = str(out)
        for count in given.rows:
            print(f"{count:,} rows ...", file=sys.stderr, flush=True)
            rows = shuffled(sentences, count)
            data, out = place / f"data-{count}", place / f"student-{count}"
            write(data, given.data, rows)
            report, peaks, seconds = distill(
                place / f"cache-{count}", out, "--teacher", teacher, "--data", str(data)
            )
            training = report["method"]["detail"]["training"]
            tokens = round(training["tokens_per_s"] * training["seconds"])
            found.append(
                {
                    "rows": count,
                    "tokens": tokens,
                    "encoded": 5 * tokens + 16 * count,
                    "strings": strings(rows),
                    "reading": peaks[START],
                    "training": peaks[TRAINING],
                    "overall": max(peaks.values()),
                    "seconds": seconds,
                }
            )
            print(f"MiB by phase: {common.by_phase(peaks)}", file=sys.stderr, flush=True)
    sizes = {"encoded": "tokenised text", "strings": "strings"}
    sizes |= {name: f"peak {name}" for name in ("reading", "training", "overall")}
    print("| rows | tokens | " + " | ".join(sizes.values()) + " | took |")
    print("|---" * (len(sizes) + 3) + "|")
    for one in found:
        cells = [f"{one['rows']:,}", f"{one['tokens']:,}"]
        cells += [f"{one[name] / MIB:.1f} MiB" for name in sizes] + [f"{one['seconds']:.0f} s"]
        print("| " + " | ".join(cells) + " |")
    first, last = found[0], found[-1]
    more = {name: last[name] - first[name] for name in first}
    if more["rows"] > 0:
        cells = [f"+{more['rows']:,}", f"+{more['tokens']:,}"]
        cells += [f"{more[name] / MIB:+.1f} MiB" for name in sizes]
        print("| " + " | ".join(cells) + " | |")
        known = more["encoded"] + more["strings"]
        print(
            f"\nA further row adds {more['training'] / more['rows']:.0f} bytes to the peak of the training and "
            f"{more['overall'] / more['rows']:.0f} to the overall one; its tokens take "
            f"{more['encoded'] / more['rows']:.0f}, its strings {more['strings'] / more['rows']:.0f}. The overall "
            f"peak grows {more['overall'] / known:.1f} times as much as both together."
        )


if __name__ == "__main__":
    main()
