"""Question: what do the stages keep of a model that gives several labels, and of one that gives a score?

    python benchmarks/tasks.py run --data goemotions=DIR --data stsb=DIR --out OUT [--lines tiny,prune]
    python benchmarks/tasks.py table --data goemotions=DIR --data stsb=DIR --out OUT

"run" fine-tunes the teacher once, by the first distillation, and gives that same fine-tuned teacher to every other
line; it skips what is there. "table" takes the numbers from the reports, and judges every directory again by
onnxruntime, the tokenizer and scikit-learn or SciPy alone (judge_alone.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import header, kdcli, report_of, row

#: Line -> stage and its options; the model comes from the teacher of the line `tiny`.
LINES: dict[str, tuple[str, list[str]]] = {
    "tiny": ("distill", ["--student", "tiny", "--control"]),
    "static": ("distill", ["--student", "static"]),
    "prune": ("prune", ["--budget", "0.5"]),
    "lowrank": ("lowrank", ["--budget", "0.6"]),
    "int8": ("quantize", []),
}
JUDGE = Path(__file__).with_name("judge_alone.py")


def teacher_of(out: Path) -> str:
    """The fine-tuned teacher, which lies in the cache."""
    return str(report_of(out / "tiny")["method"]["detail"]["teacher"]["path"])


def run(name: str, data: str, out: Path, teacher: str, lines: list[str], more: list[str]) -> None:
    """Every line for one data set."""
    for line in lines:
        stage, words = LINES[line]
        place = out / name / line
        if (place / "report.json").is_file():
            continue
        begun = time.perf_counter()
        if line == "tiny":
            words = ["--teacher", teacher, *words, *more]
        elif stage == "distill":
            words = ["--teacher", teacher_of(out / name), *words]
        else:
            words = [teacher_of(out / name), *words]
        kdcli(stage, *words, "--data", data, "-o", str(place))
        print(f"{name} {line}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def alone(place: Path, data: str) -> dict[str, Any]:
    """The metrics of a directory by other people's code."""
    words = [sys.executable, str(JUDGE), str(place), data]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return found


def table(name: str, data: str, out: Path) -> None:
    """One table: primary metric with its interval, what is kept of the teacher's, size, speed, and the number again."""
    print(f"\n{name}\n")
    titles = ("", "primary", "95 % interval", "of the teacher", "MiB", "times faster", "by onnxruntime alone")
    print(header(titles))
    first = report_of(out / name / "tiny")["before"]
    primary = first["quality"]["primary"]
    whole = first["quality"][primary]["value"]
    shown = [("teacher", first, None, None)]
    for line in LINES:
        place = out / name / line
        if (place / "report.json").is_file():
            report = report_of(place)
            shown.append((line, report["after"], report["delta"]["speedup"], alone(place, data)))
    for title, measured, speedup, judged in shown:
        metric = measured["quality"][primary]
        low, high = metric["ci95"] or (None, None)
        print(
            row(
                (
                    title,
                    f"{primary} {metric['value']:.4f}",
                    "" if low is None else f"{low:.4f} to {high:.4f}",
                    f"{metric['value'] / whole:.1%}",
                    f"{measured['size']['onnx_bytes'] / 2**20:.1f}",
                    "" if speedup is None else f"{speedup:.2f}",
                    "" if judged is None else f"{judged[primary]:.4f}",
                )
            )
        )
    control = report_of(out / name / "tiny")["method"]["detail"].get("control")
    print("\ncontrol:", json.dumps(control)[:2000])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", action="append", required=True, help="NAME=DIR; repeatable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--lines", default=",".join(LINES))
    parser.add_argument("--more", default="", help="further words for the first distillation")
    given = parser.parse_args()
    for one in given.data:
        name, _, data = one.partition("=")
        if given.what == "run":
            run(name, data, given.out, given.teacher, given.lines.split(","), given.more.split())
        else:
            table(name, data, given.out)


if __name__ == "__main__":
    main()
