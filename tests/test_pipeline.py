"""The commands as a user runs them: processes, pipes, signals, a hub cache, a mirror, the documented blocks."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from tests import forked, tiny
from tests.hub import HubMirror, lay_out_cache

ROOT = Path(__file__).parents[1]
BERT_BASE = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, its data, and a `kdcli` on the path."""
    base = tmp_path_factory.mktemp("place")
    tiny.saved(base / "teacher")
    tiny.write_data(base / "data")
    shim = base / "bin" / "kdcli"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kdcli "$@"\n')
    shim.chmod(0o755)
    return base


@pytest.fixture(scope="module")
def quick(place: Path) -> Iterator[Path]:
    """A directory with a `kdcli` that is a fork of one process: for tests of what commands do to each other.

    How a process starts and ends is for the tests that use the other one.
    """
    directory = place / "quick"
    directory.mkdir()
    socket = str(directory / "socket")
    (directory / "kdcli").write_text(forked.shim(socket))
    (directory / "kdcli").chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forked", socket],
        env=environment(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield directory
        server.kill()


def environment(place: Path, **more: str) -> dict[str, str]:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "KDCLI_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def shell(place: Path, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env=environment(place, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def accuracy_by_others(directory: Path, file: Path) -> float:
    """onnxruntime and the tokenizer alone, one row at a time."""
    names = json.loads((directory / "config.json").read_text())["id2label"]
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    right = 0
    for row in rows:
        e = tok.encode(row["text"])
        feed = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        given = {i.name: np.array([feed[i.name]], dtype=np.int64) for i in session.get_inputs()}
        right += names[str(int(session.run(None, given)[0].argmax()))] == row["label"]
    return right / len(rows)


def test_the_whole_pipe_in_a_real_shell(place: Path) -> None:
    done = shell(
        place,
        "set -o pipefail; kdcli distill --teacher teacher --student 2x32 --epochs 2 --data data -o p1"
        " | kdcli prune - --sparsity 0.3 -o p2 | kdcli lowrank - --budget 0.8 -o p3"
        " | kdcli quantize - -o p4 | kdcli evaluate - --max-drop 1.0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "p4\n"  # the result alone
    stages = ["input", "distill", "prune", "lowrank", "quantize"]
    for i, name in enumerate(["p1", "p2", "p3", "p4"], 2):
        report = json.loads((place / name / "report.json").read_text())
        assert [e["stage"] for e in report["lineage"]] == stages[:i]
        assert report["parity"]["passed"] is True
        assert report["data"]["ref"] == "data"
        found = accuracy_by_others(place / name, place / "data" / "test.csv")
        assert found == report["after"]["quality"]["accuracy"]["value"], name
    # Every output loads in a fresh process and gives its own graph's answers.
    code = (
        "import sys; from pathlib import Path; from kdcli.models.checkpoint import load;"
        "[load(Path(p)) for p in sys.argv[1:]]; print('loaded')"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, "p1", "p2", "p3", "p4"],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert fresh.stdout == "loaded\n", fresh.stderr
    back = shell(place, "kdcli prune p4 -o p5")
    assert back.returncode == 2
    assert "needs dense weights" in back.stderr
    assert not (place / "p5").exists()
    dense = shell(place, "kdcli prune p4 --dequantize -o p5")
    assert dense.returncode == 0, dense.stderr


def test_a_missed_gate_stops_the_chain_even_without_pipefail(place: Path) -> None:
    done = shell(
        place,
        "kdcli distill --teacher teacher --student 1x16 --epochs 1 --data data --gate 'accuracy>=1.01' -o g1"
        " | kdcli prune - -o g2",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (place / "g1" / "report.json").exists()  # kept
    assert not (place / "g2").exists()
    assert "g1" in done.stderr


@pytest.mark.parametrize("way", ["cache", "mirror"])
def test_bert_base_from_a_hub_cache_and_from_a_mirror(place: Path, tmp_path: Path, way: str) -> None:
    repo, revision = BERT_BASE
    encoder = tmp_path / "files" / repo
    made = tiny.untrained()
    made.model.bert.save_pretrained(encoder)
    made.tokenizer.save_pretrained(encoder)
    line = "kdcli distill --teacher bert-base --student tiny --epochs 1 --data data"
    cache = tmp_path / "hub"
    if way == "cache":
        lay_out_cache(cache, repo, revision, encoder)
        done = shell(place, f"{line} -o cached", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache))
    else:
        with HubMirror(tmp_path / "files") as mirror:
            done = shell(place, f"{line} -o mirrored", **{"HF_HUB_OFFLINE": "0", **mirror.env(cache)})
    assert done.returncode == 0, done.stderr
    report = json.loads((place / done.stdout.strip() / "report.json").read_text())
    assert report["model"]["source"] == "bert-base"
    assert report["method"]["detail"]["teacher"]["fine_tuned"] is True


def test_bert_base_without_hub_and_cache_is_exit_7_at_once(place: Path, tmp_path: Path) -> None:
    line = "kdcli distill --teacher bert-base --student tiny --data data -o nowhere"
    started = time.monotonic()
    done = shell(
        place, line, HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"
    )
    seconds = time.monotonic() - started
    assert done.returncode == 7, done.stderr
    assert done.stdout == ""
    assert "bert-base" in done.stderr
    assert seconds < 3, seconds  # the promise of the exit code's documentation
    assert not (place / "nowhere").exists()


LONG = ["distill", "--teacher", "teacher", "--student", "2x32", "--data", "data", "--epochs", "40"]
LONG += ["--augment", "0", "--batch-size", "16", "--set", "phases=one"]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """What comes out when nobody interrupts."""
    done = shell(place, shlex.join(["kdcli", *LONG, "-o", "whole"]))
    assert done.returncode == 0, done.stderr
    return place / "whole"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_gives_the_same_bytes(
    place: Path, whole: Path, number: int, code: int
) -> None:
    words, cut = LONG, f"cut{code}"
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words, "-o", cut],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    point = place / f".{cut}.resume" / "student" / "state.json"
    deadline = time.monotonic() + 60
    while not point.exists() and time.monotonic() < deadline:  # after the first epoch
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    assert "--resume" in err
    assert not (place / cut).exists()
    assert not list(place.glob(f".{cut}.tmp-*"))
    changed = shell(place, " ".join(["kdcli", *words, "--alpha", "0.7", "--resume", "-o", cut]))
    assert changed.returncode == 2
    assert "options" in changed.stderr
    done = shell(place, " ".join(["kdcli", *words, "--resume", "-o", cut]))
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert (place / cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not point.exists()


def test_the_documented_blocks_run(place: Path, quick: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "getting-started.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    for name in ("teacher", "data", "bin"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "recipe.yaml").write_text(recipe)
    path = f"{quick}{os.pathsep}{os.environ['PATH']}"
    done = shell(tmp_path, "set -euxo pipefail\n" + "\n".join(blocks), PATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "student.html").stat().st_size > 1000
    made = json.loads((tmp_path / "out" / "release" / "1-distill" / "report.json").read_text())
    assert made["command"] == ["kdcli", "run", "recipe.yaml", "-o", "out/release"]
    assert made["config"]["student"]["origin"] == "recipe"
