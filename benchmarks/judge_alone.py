"""The metrics of an output directory by onnxruntime, its tokenizer and scikit-learn or scipy alone; kdcli is not used.

    python benchmarks/judge_alone.py OUT DATA [--split test] [--compare]

OUT is a directory with model.onnx, tokenizer files and config.json, or a .onnx file in one; DATA a file, or a directory
with SPLIT.jsonl or SPLIT.csv. Columns: `text`, or `text_a` and `text_b`; `label`, or `labels` (a list, or names parted
by --sep); `query` where rows are ranked. What an answer is, how long a text may be, the names of the labels and the
thresholds are read from the metadata of the graph. One row a run: padding plays no part.

It prints one JSON object; with --compare the numbers of OUT/report.json stand beside, and a difference above 1e-6 is
exit 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy import special, stats
from sklearn import metrics as sk
from transformers import AutoTokenizer

SAME = 1e-6  # sums of doubles in another order


def main() -> int:
    """Judge, print, compare."""
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("out", type=Path)
    said.add_argument("data", type=Path)
    said.add_argument("--split", default="test")
    said.add_argument("--sep", help="between the labels of a cell of a csv")
    said.add_argument("--limit", type=int, help="the first rows only")
    said.add_argument("--compare", action="store_true", help="with report.json")
    given = said.parse_args()

    graph = given.out if given.out.suffix == ".onnx" else given.out / "model.onnx"
    about, logits = run(graph, rows := read(given.data, given.split)[: given.limit])
    task = about.get("task", "text-classification")
    found = {"task": task, "rows": len(rows), **JUDGES[task](logits, rows, about, given.sep)}
    if not given.compare:
        print(json.dumps(found, indent=1))
        return 0
    report = json.loads((graph.parent / "report.json").read_text(encoding="utf-8"))
    reported = report["after"]["quality"]
    both = {
        name: {"alone": found[name], "reported": reported[name]["value"]}
        for name in found
        if isinstance(reported.get(name), dict)
    }
    worst = max(abs(one["alone"] - one["reported"]) for one in both.values())
    same = worst <= SAME and reported["primary"] in both
    print(
        json.dumps(
            {"primary": reported["primary"], **both, "largest_difference": worst, "same": same}, indent=1
        )
    )
    return 0 if same else 1


def read(data: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split."""
    path = data
    if data.is_dir():
        path = next(p for p in (data / f"{split}.jsonl", data / f"{split}.csv") if p.is_file())
    with path.open(newline="", encoding="utf-8") as stream:
        if path.suffix == ".csv":
            return list(csv.DictReader(stream))
        return [json.loads(line) for line in stream if line.strip()]


def run(graph: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, str], np.ndarray]:
    """The metadata of the graph, and its answers (N, C)."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    takes = {one.name for one in session.get_inputs()}
    tokenizer = AutoTokenizer.from_pretrained(graph.parent)
    limit = {"truncation": True, "max_length": int(about["max_length"])}
    answers = []
    for row in rows:
        texts = (row["text"],) if "text" in row else (row["text_a"], row["text_b"])
        made = tokenizer(*texts, return_tensors="np", **limit)
        answers.append(session.run(None, {k: v.astype(np.int64) for k, v in made.items() if k in takes})[0])
    return about, np.concatenate(answers).astype(np.float64)


def one_of(
    z: np.ndarray, rows: list[dict[str, Any]], about: dict[str, str], sep: str | None
) -> dict[str, float]:
    """Of text-classification."""
    names = json.loads(about["labels"])
    truth, best = np.array([names.index(str(row["label"])) for row in rows]), z.argmax(1)
    return {
        "accuracy": float(sk.accuracy_score(truth, best)),
        "macro_f1": float(sk.f1_score(truth, best, average="macro", zero_division=0)),
        "mcc": float(sk.matthews_corrcoef(truth, best)),
        "log_loss": float(-special.log_softmax(z, 1)[np.arange(len(z)), truth].mean()),
    }


def any_of(
    z: np.ndarray, rows: list[dict[str, Any]], about: dict[str, str], sep: str | None
) -> dict[str, float]:
    """Of multi-label."""
    names, limits = json.loads(about["labels"]), np.array(json.loads(about["thresholds"]))
    sets = [row["labels"] if isinstance(row["labels"], list) else cell(row["labels"], sep) for row in rows]
    truth = np.array([[name in labels for name in names] for labels in sets])
    scores = special.expit(z)
    answers = scores >= limits
    occurs, seen = truth.any(0), truth.any(0) | answers.any(0)
    # A label that neither occurs nor is answered has no F1, one that does not occur no precision at any recall.
    return {
        "micro_f1": float(sk.f1_score(truth, answers, average="micro", zero_division=0)),
        "macro_f1": float(sk.f1_score(truth[:, seen], answers[:, seen], average="macro", zero_division=0)),
        "subset_accuracy": float(sk.accuracy_score(truth, answers)),
        "average_precision": float(
            sk.average_precision_score(truth[:, occurs], z[:, occurs], average="macro")
        ),
    }


def cell(text: str, sep: str | None) -> list[str]:
    """The labels of a cell."""
    return [part.strip() for part in (text.split(sep) if sep else [text]) if part.strip()]


def number(
    z: np.ndarray, rows: list[dict[str, Any]], about: dict[str, str], sep: str | None
) -> dict[str, float]:
    """Of regression; the ranking metrics where rows have a `query`."""
    x, y = z[:, 0], np.array([float(row["label"]) for row in rows])
    if about.get("activation") == "sigmoid":
        x = special.expit(x)
    found = {
        "spearman": float(stats.spearmanr(x, y).statistic),
        "pearson": float(stats.pearsonr(x, y).statistic),
        "rmse": float(sk.mean_squared_error(y, x) ** 0.5),
        "r2": float(sk.r2_score(y, x)),
        "pair_order": pair_order(x, y),
    }
    return found | (ranked(x, y, [row["query"] for row in rows]) if "query" in rows[0] else {})


def pair_order(x: np.ndarray, y: np.ndarray) -> float:
    """Of the pairs that differ in y, the share in the same order in x, equal x counted half; all pairs, one by one."""
    right = pairs = 0.0
    for one, score in zip(y, x, strict=True):
        above, below = x[y > one] - score, score - x[y < one]
        for gap in (above, below):
            right += (gap > 0).sum() + (gap == 0).sum() / 2
            pairs += len(gap)
    return float(right / pairs) if pairs else 0.5


def ranked(x: np.ndarray, y: np.ndarray, queries: list[str]) -> dict[str, float]:
    """NDCG@10 and MRR@10 over the queries with two rows or more and one above 0; equal scores in any order."""
    gains = np.maximum(y, 0)
    lists: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        lists.setdefault(query, []).append(i)
    ndcg, reciprocal = [], []
    for rows in lists.values():
        if len(rows) < 2 or not gains[rows].any():
            continue
        ndcg.append(sk.ndcg_score(gains[rows][None], x[rows][None], k=10))
        order = np.argsort(-x[rows], kind="stable")  # exact where no two scores of a query are equal
        first = int(np.flatnonzero(gains[rows][order])[0])
        reciprocal.append(1 / (first + 1) if first < 10 else 0.0)
    return {"ndcg_at_10": float(np.mean(ndcg)), "mrr_at_10": float(np.mean(reciprocal))}


Judge = Callable[[np.ndarray, list[dict[str, Any]], dict[str, str], str | None], dict[str, float]]
JUDGES: dict[str, Judge] = {"text-classification": one_of, "multi-label": any_of, "regression": number}

if __name__ == "__main__":
    sys.exit(main())
