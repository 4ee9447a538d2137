"""Question: what does the whole pipeline keep, and what does each stage cost?

Runs distill, prune, quantize and lowrank (on the student) through the installed command, on any data and
teacher, measures all of them together, judges every output with onnxruntime and the tokenizer alone, and prints
one Markdown table.

    python benchmarks/pipeline.py --data DIR --teacher DIR --out out/bench
    python benchmarks/pipeline.py            # the demo's own model and sentences
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import by_onnxruntime_alone, kdcli, report_of


def line(name: str, measured: dict[str, Any], seconds: float | None, alone: float | None) -> str:
    p50 = common.p50(measured)
    cells = [
        *(name, common.accuracy(measured), common.share(alone), common.parameters(measured)),
        *(common.mib(measured["size"]["onnx_bytes"]), common.macs(measured)),
        *(f"{p50[1]:.3f} ms", f"{p50[32]:.2f} ms", "" if seconds is None else f"{seconds:.0f} s"),
    ]
    return common.row(cells)


def main() -> None:
    parser = common.parser(__doc__)
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
    models = [student, pruned, thin, small]
    first = report_of(out / "student")
    fine_tuned = first["method"]["detail"]["teacher"].get("path", given.teacher)
    teacher, *measured = common.measured_together([fine_tuned, *models], *data)
    test = Path(given.data) / "test.csv" if given.data else None
    titles = [
        "accuracy",
        "onnxruntime alone",
        "parameters",
        "model.onnx",
        "MACs",
        "p50 b1",
        "p50 b32",
        "took",
    ]
    print(common.header(["", *titles]))
    print(line("teacher", teacher, None, None))
    for path, after in zip(map(Path, models), measured, strict=True):
        alone = by_onnxruntime_alone(path, test) if test is not None and test.is_file() else None
        print(line(path.name, after, sum(report_of(path)["timings"].values()), alone))


if __name__ == "__main__":
    main()
