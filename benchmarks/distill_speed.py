"""Question: how long does the same distillation take with kdcli, with TextBrewer, and with a plain loop?

The three train the same student (2 layers of 128) from the same first weights, on the same rows, with the same
loss, batch size, rates, steps and seed, one after the other, each in a process of its own:

- kdcli: the installed command, with an empty cache, so that the teacher's pass and its ONNX export count.
- textbrewer: BasicDistiller of TextBrewer 0.2.1.post1 with its cache of logits; every batch is padded to its own
  longest row. The loader is the user's part of TextBrewer, and this is the better of the two usual ones for it.
- plain: a loop over a torch DataLoader; the teacher runs at every step, every row is padded to the longest one of
  the data. (`--ways plain-short`: the same, every batch padded to its own longest row.)

Which rows share a batch is each one's own matter: kdcli's are of like length, the others' are drawn at random, and
TextBrewer's stay the same in every epoch. That decides the padding, and the accuracy differs with it.

"teacher" and "student" are the seconds of the distillation itself, without imports, loading and tokenising. What is
in doubt counts against kdcli: its teacher seconds hold the export and the check of both ONNX graphs, the student's
included, and its student seconds hold the validation after every epoch and the resume points, which the others do
not have. "process" is everything from start to exit; of kdcli that is the whole command, which also measures and
times both models and writes the report. "CPU" are the processor seconds of the process, which depend less on
what else the machine does. The peak of memory counts memory-mapped files. kdcli keeps the weights of its best
epoch on validation, the others those of the last one.

    pip install textbrewer==0.2.1.post1 tensorboard
    OMP_NUM_THREADS=2 python benchmarks/distill_speed.py --data DIR --teacher DIR

The teacher is a BERT with a head for the data's labels; train.csv, validation.csv and test.csv have the columns
text and label.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WAYS = ("kdcli", "textbrewer", "plain", "plain-short")
LAYERS, HIDDEN = 2, 128
CLIP = 1.0  # largest gradient norm; kdcli's is fixed


@dataclass(frozen=True)
class Recipe:
    """What all of them do."""

    data: str
    teacher: str
    work: str  # holds first/ (the first weights), and a directory and a JSON file for every way
    epochs: int
    batch_size: int
    lr: float
    alpha: float
    temperature: float
    warmup: float
    weight_decay: float
    dropout: float
    seed: int

    def place(self, name: str) -> Path:
        return Path(self.work) / name


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------- inside the processes that train


def load(path: str | Path) -> Any:
    """A classifier in float32: files in half precision would be computed so, which is slow on a CPU."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)


def first_weights(r: Recipe) -> None:
    """The student before training; its embedding tables are the teacher's, projected on the leading directions."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(r.seed)
    teacher = load(r.teacher)
    names = ("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")
    config = BertConfig(
        **{name: getattr(teacher.config, name) for name in names},
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HIDDEN // 64,
        intermediate_size=4 * HIDDEN,
        hidden_dropout_prob=r.dropout,
        attention_probs_dropout_prob=r.dropout,
        id2label=teacher.config.id2label,
        label2id=teacher.config.label2id,
    )
    student = BertForSequenceClassification(config)
    words = teacher.get_input_embeddings().weight.detach().double()
    directions = torch.linalg.eigh(words.T @ words).eigenvectors[:, -HIDDEN:]
    with torch.no_grad():
        for part in ("word", "position", "token_type"):
            table = f"bert.embeddings.{part}_embeddings.weight"
            student.get_parameter(table).copy_(teacher.get_parameter(table).double() @ directions)
    student.save_pretrained(r.place("first"))
    AutoTokenizer.from_pretrained(r.teacher).save_pretrained(r.place("first"))


@dataclass
class Lesson:
    """Models, rows and optimizer of a loop without kdcli; counts what goes through the loader."""

    r: Recipe
    short: bool  # pad a batch to its own longest row, not to that of the data
    tokens: int = 0
    cells: int = 0
    teacher_seconds: float = 0.0

    def __post_init__(self) -> None:
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from transformers import AutoTokenizer

        r = self.r
        random.seed(r.seed)  # of TextBrewer's shuffling
        torch.manual_seed(r.seed)
        self.teacher, self.student = load(r.teacher).eval(), load(r.place("first"))
        rows = read(Path(r.data) / "train.csv")
        tokenizer = AutoTokenizer.from_pretrained(r.teacher)
        longest = self.teacher.config.max_position_embeddings
        made = tokenizer(
            [row["text"] for row in rows],
            truncation=True,
            max_length=longest,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.tensor([self.teacher.config.label2id[row["label"]] for row in rows])
        data = TensorDataset(made["input_ids"], made["attention_mask"], labels)
        self.loader: Any = DataLoader(data, r.batch_size, shuffle=True, collate_fn=self.collate)
        parameters = list(self.student.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": r.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=r.lr)
        steps = r.epochs * len(self.loader)
        warm = max(1, round(r.warmup * steps))
        self.rate: Callable[[int], float] = lambda step: (
            (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)
        )
        self.teacher.register_forward_pre_hook(lambda *_: self._count(-time.perf_counter()))
        self.teacher.register_forward_hook(lambda *_: self._count(time.perf_counter()))

    def _count(self, seconds: float) -> None:
        self.teacher_seconds += seconds

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        from torch.utils.data import default_collate

        ids, mask, labels = default_collate(rows)
        if self.short:
            width = int(mask.sum(1).max())
            ids, mask = ids[:, :width], mask[:, :width]
        self.tokens, self.cells = self.tokens + int(mask.sum()), self.cells + mask.numel()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def end(self, seconds: float, tokens: int) -> dict[str, Any]:
        """Keep the student and say what was done; ``tokens`` are those that the student was trained on."""
        self.student.save_pretrained(self.r.place("student"))
        return {
            "teacher": self.teacher_seconds,
            "student": seconds - self.teacher_seconds,
            "steps": self.r.epochs * len(self.loader),
            "tokens": tokens,
            "padding": 1 - self.tokens / self.cells,
        }


def plain(r: Recipe, short: bool) -> dict[str, Any]:
    """The loop of a tutorial."""
    import torch
    import torch.nn.functional as F

    lesson = Lesson(r, short)
    teacher, student, optimizer = lesson.teacher, lesson.student, lesson.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lesson.rate)
    student.train()
    started = time.perf_counter()
    for _ in range(r.epochs):
        for batch in lesson.loader:
            labels = batch.pop("labels")
            with torch.no_grad():
                soft = teacher(**batch).logits / r.temperature
            logits = student(**batch).logits
            match = F.kl_div(
                F.log_softmax(logits / r.temperature, 1),
                F.log_softmax(soft, 1),
                log_target=True,
                reduction="batchmean",
            )
            hard = F.cross_entropy(logits, labels)
            loss = r.alpha * r.temperature**2 * match + (1 - r.alpha) * hard
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
    return lesson.end(time.perf_counter() - started, lesson.tokens)


def textbrewer(r: Recipe) -> dict[str, Any]:
    """TextBrewer as it is; nothing of the package is changed."""
    import torch
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig

    lesson = Lesson(r, short=True)
    # Its cross entropy with the teacher's probabilities has the gradient of the divergence, without T^2.
    method = DistillationConfig(
        temperature=r.temperature,
        kd_loss_type="ce",
        kd_loss_weight=r.alpha * r.temperature**2,
        hard_label_weight=1 - r.alpha,
        is_caching_logits=True,
    )
    config = TrainingConfig(output_dir=str(r.place("textbrewer")), device="cpu", fp16=False)
    distiller = BasicDistiller(
        config,
        method,
        lesson.teacher,
        lesson.student,
        lambda batch, output: {"logits": output.logits},
        lambda batch, output: {"logits": output.logits, "losses": output.loss},
    )
    started = time.perf_counter()
    with distiller:
        distiller.train(
            lesson.optimizer,
            lesson.loader,
            num_epochs=r.epochs,
            scheduler_class=torch.optim.lr_scheduler.LambdaLR,
            scheduler_args={"lr_lambda": lesson.rate},
            max_grad_norm=CLIP,
        )
    # The loader ran once, for the cache.
    return lesson.end(time.perf_counter() - started, lesson.tokens * r.epochs)


def accuracy(r: Recipe) -> float:
    """Of the student in ``student/`` on the test split, by plain torch."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = load(r.place("student")).eval(), AutoTokenizer.from_pretrained(r.teacher)
    rows = read(Path(r.data) / "test.csv")
    right = 0
    for start in range(0, len(rows), 128):
        some = rows[start : start + 128]
        texts = [row["text"] for row in some]
        length = model.config.max_position_embeddings
        batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**batch).logits.argmax(1).tolist()
        right += sum(model.config.id2label[i] == row["label"] for i, row in zip(best, some, strict=True))
    return right / len(rows)


def work(way: str, r: Recipe) -> None:
    """One way, inside its own process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if way == "first":
        first_weights(r)
        return
    if way == "accuracy":
        found = {"accuracy": accuracy(r)}
    else:
        found = textbrewer(r) if way == "textbrewer" else plain(r, way == "plain-short")
    r.place("result.json").write_text(json.dumps(found), encoding="utf-8")


# ---------------------------------------------------------------- the process that compares


def measured(command: list[str], **environment: str) -> dict[str, float]:
    """Run a command: seconds, processor seconds, and MiB of its peak memory.

    This process imports no torch: a child's peak begins with the size of the process that started it.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {' '.join(command)}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"process": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": peak}


def own(way: str, r: Recipe) -> dict[str, float]:
    """Run one way of this script in a process of its own."""
    return measured([sys.executable, __file__, "--worker", way, json.dumps(asdict(r))])


def kdcli(r: Recipe) -> dict[str, Any]:
    """The installed command. Every option is given, so that its defaults do not matter."""
    out = r.place("student")
    options = {
        "--teacher": r.teacher,
        "--student": str(r.place("first")),
        "--data": r.data,
        "--method": "response",
        "--strategy": "teacher-assisted",
        "--alpha": r.alpha,
        "--temperature": r.temperature,
        "--epochs": r.epochs,
        "--lr": r.lr,
        "--batch-size": r.batch_size,
        "--augment": 0,
        "--seed": r.seed,
        "--device": "cpu",
        "--out": str(out),
    }
    settings = {
        "warmup": r.warmup,
        "weight_decay": r.weight_decay,
        "dropout": r.dropout,
        "phases": "one",
    }
    command = [sys.executable, "-m", "kdcli", "distill", "--offline", "--quiet"]
    command += [str(word) for pair in options.items() for word in pair]
    command += [word for pair in settings.items() for word in ("--set", f"{pair[0]}={pair[1]}")]
    usage = measured(command, KDCLI_CACHE=str(r.place("cache")))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    detail, timings = report["method"]["detail"], report["timings"]
    training, teacher = detail["training"], detail["seconds"]["teacher"]
    graphs = sum(timings.get(name, 0.0) for name in ("export", "parity", "fusion"))
    phases = ", ".join(f"{name} {value:.1f}" for name, value in timings.items())
    return usage | {
        "teacher": teacher + graphs,
        "student": timings["apply"] - teacher,
        "steps": training["steps"],
        "tokens": round(training["tokens_per_s"] * training["seconds"]),
        "padding": training["padding_share"],
        "notes": f"kdcli: teacher's pass {teacher:.1f} s, both ONNX graphs {graphs:.1f} s, training steps alone "
        f"{training['seconds']:.1f} s; kept epoch {training['best_epoch']} of {training['epochs']}\n"
        f"kdcli, seconds of its phases: {phases}",
    }


def result(r: Recipe) -> dict[str, Any]:
    """What the last process of this script left."""
    found: dict[str, Any] = json.loads(r.place("result.json").read_text(encoding="utf-8"))
    return found


def compare(ways: list[str], recipe: Recipe) -> None:
    """Run all of them and print the table."""
    own("first", recipe)
    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        print(f"{way} ...", file=sys.stderr, flush=True)
        place = recipe.place(way)
        place.mkdir()
        (place / "first").symlink_to(recipe.place("first").resolve())
        r = Recipe(**(asdict(recipe) | {"work": str(place)}))
        found = kdcli(r) if way == "kdcli" else own(way, r) | result(r)
        own("accuracy", r)
        results[way] = found | result(r)
    base = results.get("kdcli")
    titles = ["", "teacher", "student", "both", "process", "CPU", "real tokens a second", "padding", "steps"]
    titles += ["test accuracy", "peak memory", "both / kdcli", "process / kdcli"]
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    for way, found in results.items():
        both = found["teacher"] + found["student"]
        cells = [
            way,
            f"{found['teacher']:.1f} s",
            f"{found['student']:.1f} s",
            f"{both:.1f} s",
            f"{found['process']:.1f} s",
            f"{found['cpu']:.1f} s",
            f"{found['tokens'] / both:,.0f}",
            f"{found['padding']:.1%}",
            str(found["steps"]),
            f"{100 * found['accuracy']:.2f}",
            f"{found['peak']:.0f} MiB",
            "" if base is None else f"{both / (base['teacher'] + base['student']):.2f}",
            "" if base is None else f"{found['process'] / base['process']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    options = {k: v for k, v in asdict(recipe).items() if k not in ("data", "teacher", "work")}
    print("\n" + ", ".join(f"{k} {v}" for k, v in options.items()) + f"; {threads} threads")
    if base is not None:
        print(base["notes"])
    if len({found["steps"] for found in results.values()}) > 1:
        sys.exit("the numbers of steps differ: this is not the same training")


def subset(data: Path, rows: int, target: Path) -> None:
    """The data with ``rows`` training rows, evenly spread."""
    target.mkdir()
    for split in ("train", "validation", "test"):
        all_rows = read(data / f"{split}.csv")
        count = min(rows, len(all_rows)) if split == "train" else len(all_rows)
        with (target / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(all_rows[i * len(all_rows) // count] for i in range(count))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Recipe(**json.loads(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="use so many training rows only")
    parser.add_argument("--ways", default="kdcli,textbrewer,plain", help="any of " + ", ".join(WAYS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    ways = given.pop("ways").split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"unknown way {', '.join(unknown)}; there are {', '.join(WAYS)}")
    boards = ("tensorboard", "tensorboardX")  # it imports one of them, used or not
    if "textbrewer" in ways and not (
        importlib.util.find_spec("textbrewer") and any(map(importlib.util.find_spec, boards))
    ):
        print(
            "TextBrewer is missing and left out: pip install textbrewer==0.2.1.post1 tensorboard",
            file=sys.stderr,
        )
        ways.remove("textbrewer")
    if not ways:
        sys.exit("nothing is left to compare")
    with tempfile.TemporaryDirectory(prefix="kdcli-speed-") as temporary:
        data, rows = given.pop("data").resolve(), given.pop("rows")
        if rows is not None:
            subset(data, rows, Path(temporary) / "data")
            data = Path(temporary) / "data"
        teacher = str(given.pop("teacher").resolve())
        compare(ways, Recipe(data=str(data), teacher=teacher, work=temporary, **given))


if __name__ == "__main__":
    main()
