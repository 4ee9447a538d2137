"""What the benchmarks share: the installed command, lanes, reports, tables, and onnxruntime alone."""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kdcli as _telemetry_off  # noqa: F401 - switches off the telemetry of what is loaded later

EVERY = 0.02  # seconds between two samples of memory


def kdcli(*words: str) -> str:
    """Run one command of the installed kdcli and return its stdout; anything but exit 0 stops the benchmark."""
    command = [sys.executable, "-m", "kdcli", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_lines(stage: str, lines: Sequence[tuple[str, Path, list[str]]], lane: str) -> None:
    """Run a stage for every line (title, output, words) of a lane K/N; skip what is there, go on after a failure."""
    number, lanes = (int(part) for part in lane.split("/"))
    for title, out, words in lines[number::lanes]:
        if (out / "report.json").is_file():
            continue
        print(title, file=sys.stderr, flush=True)
        try:
            kdcli(stage, *words, "-o", str(out))
        except subprocess.CalledProcessError as error:
            print(f"  failed with exit code {error.returncode}", file=sys.stderr, flush=True)


def measured_together(models: Iterable[str | Path], *words: str) -> list[dict[str, Any]]:
    """Every model measured by one `kdcli evaluate`, so that all latencies are of the same alternating rounds."""
    return [one["after"] for one in json.loads(kdcli("evaluate", *map(str, models), *words, "--json"))]


# ---------------------------------------------------------------- reports and tables


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def reports(out: Path) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """(name, data) -> seed -> report, of all directories NAME--DATA--SEED."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("*--*--*/report.json")):
        name, source, seed = path.parent.name.split("--")
        found.setdefault((name, source), {})[int(seed)] = report_of(path.parent) | {"path": path.parent}
    return found


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def header(titles: Sequence[str]) -> str:
    return row(titles) + "\n" + "|---" * len(titles) + "|"


def mean(values: list[float]) -> str:
    """Mean and spread (standard deviation over seeds) in per cent."""
    shown = f"{100 * statistics.mean(values):.2f}"
    return shown + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def accuracy(measured: dict[str, Any]) -> str:
    """Accuracy and its standard error in per cent."""
    found = measured["quality"]["accuracy"]
    return f"{100 * found['value']:.2f} ± {100 * found['stderr']:.2f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def parameters(measured: dict[str, Any]) -> str:
    return f"{measured['size']['parameters'] / 1e6:.2f} M"


def mib(size: int, digits: int = 2) -> str:
    return f"{size / 2**20:.{digits}f} MiB"


def macs(measured: dict[str, Any], digits: int = 2) -> str:
    return f"{measured['compute']['macs'] / 1e6:.{digits}f} M"


def p50(measured: dict[str, Any]) -> dict[int, float]:
    """Batch size -> median latency of the graph in ms."""
    return {one["batch"]: one["p50_ms"] for one in measured["latency"] if one["runtime"] == "onnx"}


# ---------------------------------------------------------------- onnxruntime and the tokenizer, without kdcli


def encode(model: Path, file: Path) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Feeds of one row each (1, T), and labels; the tokenizer alone."""
    from tokenizers import Tokenizer

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(config.get("max_position_embeddings", 512))
    tokenizer.no_padding()
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    made = []
    for one in tokenizer.encode_batch([row["text"] for row in rows]):
        arrays = {"input_ids": one.ids, "attention_mask": one.attention_mask, "token_type_ids": one.type_ids}
        made.append({name: np.array([values], dtype=np.int64) for name, values in arrays.items()})
    return made, [row["label"] for row in rows]


def session(path: Path, threads: int = 0) -> Any:
    """A graph on the CPU; 0 threads: as many as cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits(path: Path, rows: list[dict[str, np.ndarray]], threads: int = 0) -> np.ndarray:
    """Logits (N, C) of every row, alone."""
    opened = session(path, threads)
    names = [i.name for i in opened.get_inputs()]
    return np.concatenate([opened.run(None, {n: row[n] for n in names})[0] for row in rows])


def answers(path: Path, rows: list[dict[str, np.ndarray]], threads: int = 0) -> np.ndarray:
    """The top-1 class of every row, alone."""
    found: np.ndarray = logits(path, rows, threads).argmax(1)
    return found


def truth(model: Path, labels: list[str]) -> np.ndarray:
    """The classes that a model's config.json gives these labels; -1 for one it does not know."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    classes = {label: int(i) for i, label in config["id2label"].items()}
    return np.array([classes.get(label, -1) for label in labels])


def by_onnxruntime_alone(directory: Path, file: Path) -> float:
    """Accuracy of model.onnx, one row at a time."""
    rows, labels = encode(directory, file)
    return float((answers(directory / "model.onnx", rows) == truth(directory, labels)).mean())


# ---------------------------------------------------------------- command lines


def pairs(given: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in given)


def parser(text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def commands(
    whole: argparse.ArgumentParser, *functions: Callable[[argparse.Namespace], None]
) -> list[argparse.ArgumentParser]:
    """One command for every function, of its name; what is parsed holds the ``function``."""
    made, several = [], whole.add_subparsers(required=True)
    for function in functions:
        made.append(command := several.add_parser(function.__name__))
        command.set_defaults(function=function)
    return made


def named(command: argparse.ArgumentParser, *names: str) -> None:
    """Repeatable options NAME=DIR."""
    for name in names:
        command.add_argument(f"--{name}", action="append", default=[], metavar="NAME=DIR")


def lane(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lane", default="0/1", help="K/N: every N-th line, from the K-th")


# ---------------------------------------------------------------- memory


def anonymous(pid: int) -> int:
    """Bytes of memory of a process that belong to no file; 0 when it has ended. Linux only."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as stream:
            return next((1024 * int(line.split()[1]) for line in stream if line.startswith("RssAnon")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
            return [int(word) for word in stream.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def sampled(stage: str, *words: str, cache: Path | None = None) -> tuple[dict[str, int], float]:
    """Run a stage of the installed kdcli while its anonymous memory, and its children's, is sampled.

    Returns:
        Phase -> peak in bytes, by the lines in which kdcli announces its phases ("start" before the first), and the
        seconds of the whole command. A command that fails ends the benchmark with what it said.
    """
    announced = f"kdcli {stage}: "
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", stage, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({"KDCLI_CACHE": str(cache)} if cache else {}),
    )
    phases, lines = ["start"], []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith(announced) and not line.startswith(f"{announced}done in"):
                phases.append(line.removeprefix(announced).strip())

    listener = threading.Thread(target=listen)
    listener.start()
    peaks: dict[str, int] = {}
    while process.poll() is None:
        found = sum(map(anonymous, [process.pid, *children(process.pid)]))
        peaks[phases[-1]] = max(peaks.get(phases[-1], 0), found)
        time.sleep(EVERY)
    listener.join()
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"exit {process.returncode}: kdcli {stage} {' '.join(words)}\n{''.join(lines)}")
    return peaks, seconds


def by_phase(peaks: dict[str, int]) -> str:
    return ", ".join(f"{phase} {peak / 2**20:.0f}" for phase, peak in peaks.items())
