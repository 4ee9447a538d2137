"""Question: what does every scheme of `kdcli quantize` keep, save and cost, and how do other tools compare?

    python benchmarks/quantize.py run --model minilm=DIR --data DIR --out OUT [--lines int4,fp16]
    python benchmarks/quantize.py peers --model minilm=DIR --data DIR --out OUT --peer-python venv/bin/python
    python benchmarks/quantize.py table --data DIR --out OUT

"run" quantises with the installed command, one directory a line, and skips what is there. "peers" writes the model as
one fp32 ONNX file without fusions and gives that same file to onnxruntime's `quantize_dynamic` with its defaults, to
NNCF with `model_type=TRANSFORMER`, and to Olive's dynamic pass; the last two run in an environment of their own, given
by --peer-python, because their pins and kdcli's do not agree. "table" measures all of them: accuracy on test.csv by
onnxruntime and the tokenizer alone, row by row; agreement with the fp32 model's answers; bytes; and the median latency
at batch 1 and 32, all models in turns in one process, so that a slow minute is nobody's alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import common
import numpy as np
from common import answers, encode, session

#: Line -> options of `kdcli quantize`.
LINES: dict[str, list[str]] = {
    "dynamic-int8": [],
    "dynamic-int8-full": ["--set", "reduce_range=false"],
    "dynamic-uint8": ["--set", "unsigned=true"],
    "dynamic-smooth": ["--set", "smooth=0.5"],
    "mixed": ["--embeddings", "int4"],
    "dynamic-6bit": ["--set", "bits=6"],
    "dynamic-4bit": ["--set", "bits=4"],
    "static-int8": ["--scheme", "static-int8"],
    "static-percentile": ["--scheme", "static-int8", "--calibration", "percentile"],
    "static-entropy": ["--scheme", "static-int8", "--calibration", "entropy"],
    "static-mse": ["--scheme", "static-int8", "--calibration", "mse"],
    "static-smooth": ["--scheme", "static-int8", "--set", "smooth=0.5"],
    "int4": ["--scheme", "int4"],
    "int4-rtn": ["--scheme", "int4", "--set", "rounding=rtn"],
    "int4-hqq": ["--scheme", "int4", "--set", "rounding=hqq"],
    "int4-products-int8": ["--scheme", "int4", "--set", "compute=int8"],
    "int4-int8-tables": ["--scheme", "int4", "--embeddings", "int8"],
    "int3": ["--scheme", "int4", "--set", "bits=3", "--set", "group=32"],
    "int2": ["--scheme", "int4", "--set", "bits=2", "--set", "group=32"],
    "fp16": ["--scheme", "fp16"],
    "int8-qat": ["--scheme", "int8-qat"],
    "ternary": ["--scheme", "ternary"],
    "binary": ["--scheme", "binary"],
    "ternary, activations=float": ["--scheme", "ternary", "--set", "activations=float"],
    "binary, activations=float": ["--scheme", "binary", "--set", "activations=float"],
    "auto": ["--scheme", "auto"],
}
PEERS = ("onnxruntime-dynamic", "nncf-transformer", "olive-dynamic")

PEER_CODE = """
import json, sys, time
name, source, target, feeds = sys.argv[1:5]
started = time.perf_counter()
if name == "nncf-transformer":
    import numpy as np, nncf, onnx
    stored = np.load(feeds)
    count = int(stored["count"])
    keys = [k for k in stored.files if k != "count" and k.endswith("_0")]
    rows = [{k[:-2]: stored[f"{k[:-2]}_{i}"] for k in keys} for i in range(count)]
    model = onnx.load(source)
    made = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=count)
    onnx.save(made, target)
else:
    import shutil, tempfile
    from pathlib import Path
    from olive.workflows import run
    work = tempfile.mkdtemp()
    config = {
        "input_model": {"type": "ONNXModel", "model_path": source},
        "passes": {"q": {"type": "OnnxDynamicQuantization"}},
        "output_dir": work, "cache_dir": work + "/cache", "log_severity_level": 3,
    }
    run(config)
    shutil.copy(max(Path(work).rglob("model.onnx"), key=lambda p: p.stat().st_mtime), target)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def named(given: str) -> tuple[str, Path]:
    name, _, path = given.partition("=")
    return name, Path(path)


def run(given: argparse.Namespace) -> None:
    name, model = named(given.model)
    for line in given.lines.split(",") if given.lines else LINES:
        out = given.out / name / line
        if (out / "report.json").is_file():
            continue
        started = time.perf_counter()
        command = [sys.executable, "-m", "kdcli", "quantize", str(model), "--data", str(given.data)]
        command += [*LINES[line], "--limit", str(given.limit), "-o", str(out), "-q"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        print(
            f"{line}: exit {done.returncode}, {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)


def peers(given: argparse.Namespace) -> None:
    """The same plain fp32 graph for everybody."""
    from onnxruntime.quantization import quantize_dynamic

    from kdcli.export import fusion, onnx
    from kdcli.inputs.text import TEXT
    from kdcli.models import checkpoint as checkpoints

    name, model = named(given.model)
    (folder := given.out / name).mkdir(parents=True, exist_ok=True)
    plain, fused = folder / "fp32.onnx", folder / "fp32-fused.onnx"
    loaded = checkpoints.load(model)
    inputs = ["input_ids", "attention_mask"]
    if int(getattr(loaded.config, "type_vocab_size", 0) or 0) >= 2:
        inputs.append("token_type_ids")
    if not plain.is_file():
        onnx.export(loaded.model, TEXT.example(int(loaded.config.vocab_size), inputs, "cpu"), plain)
        if not fusion.fuse(plain, fused):
            fused.write_bytes(plain.read_bytes())
    feeds = folder / "calibration.npz"
    rows = encode(model, given.data / "train.csv")[0]
    draw = np.random.default_rng(0).choice(len(rows), min(128, len(rows)), replace=False)
    arrays = {f"{key}_{i}": rows[row][key] for i, row in enumerate(draw) for key in inputs}
    np.savez(feeds, count=len(draw), **arrays)
    seconds: dict[str, float] = {}
    for peer in PEERS:
        target = folder / f"{peer}.onnx"
        if target.is_file():
            continue
        if peer == "onnxruntime-dynamic":
            started = time.perf_counter()
            quantize_dynamic(plain, target)
            seconds[peer] = time.perf_counter() - started
        elif given.peer_python:
            words = [given.peer_python, "-c", PEER_CODE, peer, str(plain), str(target), str(feeds)]
            done = subprocess.run(
                words, capture_output=True, text=True, env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"}
            )
            if done.returncode:
                print(f"{peer}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            seconds[peer] = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]
    known = folder / "peers.json"
    earlier = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    known.write_text(json.dumps(earlier | seconds, indent=1) + "\n", encoding="utf-8")


def batch(rows: list[dict[str, np.ndarray]], pad: int) -> dict[str, np.ndarray]:
    width = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str, value: int) -> np.ndarray:
        made = np.full((len(rows), width), value, dtype=np.int64)
        for i, row in enumerate(rows):
            made[i, : row[name].shape[1]] = row[name][0]
        return made

    return {name: padded(name, pad if name == "input_ids" else 0) for name in rows[0]}


def latencies(
    paths: list[Path], rows: list[dict[str, np.ndarray]], pad: int, threads: int, rounds: int
) -> list[dict[int, float]]:
    """Median milliseconds at batch 1 and 32, all graphs in turns."""
    draw = np.random.default_rng(0)
    feeds = {
        size: [
            batch([rows[i] for i in draw.integers(0, len(rows), size)], pad)
            for _ in range(24 if size == 1 else 4)
        ]
        for size in (1, 32)
    }
    times: list[dict[int, list[float]]] = [{1: [], 32: []} for _ in paths]
    for _ in range(rounds):
        for path, found in zip(paths, times, strict=True):
            opened = session(path, threads)
            names = [i.name for i in opened.get_inputs()]
            for size, given in feeds.items():
                for warm in given[:2]:
                    opened.run(None, {n: warm[n] for n in names})
                for one in given:
                    feed = {n: one[n] for n in names}
                    started = time.perf_counter()
                    opened.run(None, feed)
                    found[size].append(1e3 * (time.perf_counter() - started))
            del opened
    return [{size: float(np.median(values)) for size, values in found.items()} for found in times]


def table(given: argparse.Namespace) -> None:
    """Measure everything in ``--out`` and print it; measured lines are kept in measured.json."""
    name, model = named(given.model)
    folder = given.out / name
    graphs = {"fp32": folder / "fp32-fused.onnx", "fp32, not fused": folder / "fp32.onnx"}
    seconds: dict[str, float | None] = {"fp32": None, "fp32, not fused": None}
    for line in LINES:
        if (folder / line / "report.json").is_file():
            graphs[line] = folder / line / "model.onnx"
            seconds[line] = common.report_of(folder / line)["timings"].get("apply")
    took = json.loads((folder / "peers.json").read_text(encoding="utf-8"))
    for peer in PEERS:
        if (folder / f"{peer}.onnx").is_file():
            graphs[peer], seconds[peer] = folder / f"{peer}.onnx", took.get(peer)
    rows, labels = encode(model, given.data / "test.csv")
    if given.rows:
        picked = np.sort(np.random.default_rng(0).choice(len(rows), given.rows, replace=False))
        rows, labels = [rows[i] for i in picked], [labels[i] for i in picked]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    truth = common.truth(model, labels)
    pad = int(config.get("pad_token_id") or 0)
    known_file = folder / "measured.json"
    known = json.loads(known_file.read_text(encoding="utf-8")) if known_file.is_file() else {}
    for title, path in graphs.items():
        key = f"{title}, {len(rows)} rows"
        if key not in known:
            known[key] = answers(path, rows, given.threads).tolist()
            known_file.write_text(json.dumps(known), encoding="utf-8")
    times = latencies(list(graphs.values()), rows, pad, given.threads, given.rounds)
    reference = np.array(known[f"fp32, {len(rows)} rows"])
    whole = graphs["fp32"].stat().st_size
    print(f"{name}: {len(rows)} rows of test.csv, {given.threads} threads\n")
    titles = ["accuracy", "same answer", "model.onnx", "of fp32", "p50 b1", "p50 b32", "quantising"]
    print(common.header(["", *titles]))
    for (title, path), found in zip(graphs.items(), times, strict=True):
        got = np.array(known[f"{title}, {len(rows)} rows"])
        right = float((got == truth).mean())
        error = math.sqrt(right * (1 - right) / len(rows))
        size = path.stat().st_size
        cells = [
            title,
            f"{100 * right:.2f} ± {100 * error:.2f}",
            f"{100 * float((got == reference).mean()):.2f} %",
            common.mib(size),
            f"{100 * size / whole:.1f} %",
            f"{found[1]:.2f} ms",
            f"{found[32]:.1f} ms",
            "" if seconds[title] is None else f"{seconds[title]:.1f} s",
        ]
        print(common.row(cells))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=("run", "peers", "table"))
    parser.add_argument("--model", required=True, help="NAME=DIR")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with train, validation and test.csv"
    )
    parser.add_argument("--out", type=Path, default=Path("kdcli-out/quantize-bench"))
    parser.add_argument("--lines", help="comma-separated; all by default")
    parser.add_argument(
        "--limit", type=int, default=500, help="rows that `kdcli quantize` itself measures on"
    )
    parser.add_argument("--rows", type=int, help="of test.csv, for the table; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of latencies")
    parser.add_argument("--peer-python", help="of an environment with nncf and olive-ai")
    given = parser.parse_args()
    {"run": run, "peers": peers, "table": table}[given.what](given)


if __name__ == "__main__":
    main()
