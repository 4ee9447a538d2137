"""Tiny random models of every family, and tiny separable text, made in code."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcli.models.checkpoint import Checkpoint, fresh, load, save
from kdcli.models.transforms import TransformLog
from kdcli.tasks.task import Task

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet")
LABELS = ["negative", "positive"]

_GOOD = ["good", "great", "fine", "superb", "lovely", "bright", "warm", "sharp", "funny", "moving"]
_BAD = ["bad", "awful", "dull", "weak", "boring", "grey", "cold", "blunt", "sad", "flat"]
_FILL = [
    *["the", "a", "film", "plot", "scene", "actor", "of", "and", "with", "in"],
    *["very", "quite", "it", "was", "is", "this", "that", "story", "ending", "music"],
]
WORDS = _GOOD + _BAD + _FILL


def sentence(rng: random.Random, positive: bool) -> str:
    """A sentence of 3 to 12 words with one telling word."""
    words = rng.choices(_FILL, k=rng.randint(2, 11))
    words.insert(rng.randrange(len(words) + 1), rng.choice(_GOOD if positive else _BAD))
    return " ".join(words)


def write_data(directory: Path, rows: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Write train, validation and test CSV files of separable sentences."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or {"train": 96, "validation": 32, "test": 40}).items():
        with (directory / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            for i in range(count):
                writer.writerow([sentence(rng, i % 2 == 1), LABELS[i % 2]])
    return directory


def tokenizer(family: str = "bert") -> Any:
    """A word-level tokenizer whose special tokens suit the family."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if family in ("roberta", "mpnet"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        cls, pad, sep, unk, mask = special
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pad, unk, cls, sep, mask = special
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    second = 0 if family in ("roberta", "mpnet", "distilbert") else 1
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:{second} {sep}:{second}",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        pad_token=pad,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        model_max_length=40,
    )


def config(
    family: str = "bert", *, layers: int = 2, hidden: int = 32, heads: int = 4, neurons: int = 48
) -> Any:
    """A configuration of the family with random-model sizes."""
    from transformers import AutoConfig

    tok = tokenizer(family)
    common: dict[str, Any] = {
        "vocab_size": len(tok),
        "max_position_embeddings": 42,
        "pad_token_id": tok.pad_token_id,
    }
    common |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    if family == "distilbert":
        return AutoConfig.for_model(
            family, dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=neurons, **common
        )
    if family == "electra":
        common["embedding_size"] = hidden
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        **common,
    )


def checkpoint(family: str = "bert", *, seed: int = 0, **sizes: int) -> Checkpoint:
    """A random model whose weights are large enough for its outputs to differ between rows."""
    torch.manual_seed(seed)
    model = fresh(config(family, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    tok = tokenizer(family)
    return Checkpoint(model.eval(), tok, list(LABELS), TransformLog(), Path("/nonexistent"))


def untrained(family: str = "bert", *, seed: int = 0, **sizes: int) -> Checkpoint:
    """A model with the library's own small initial weights, which can be trained."""
    torch.manual_seed(seed)
    model = fresh(config(family, **sizes))
    return Checkpoint(model.eval(), tokenizer(family), list(LABELS), TransformLog(), Path("/nonexistent"))


def saved(
    directory: Path, family: str = "bert", *, seed: int = 0, by_kdcli: bool = False, **sizes: int
) -> Path:
    """Write a random model as plain transformers would, or as kdcli does."""
    directory.mkdir(parents=True, exist_ok=True)
    made = checkpoint(family, seed=seed, **sizes)
    if by_kdcli:
        save(made, directory)
        return directory
    made.config.architectures = [type(made.model).__name__]
    made.model.save_pretrained(directory)
    made.tokenizer.save_pretrained(directory)
    return directory


def of_task(directory: Path, task: Task, labels: Sequence[str]) -> Path:
    """Write a random model of one small layer that answers a task, as kdcli does."""
    settings = config(layers=1, hidden=16, heads=2, neurons=24)
    settings.id2label = dict(enumerate(labels))
    settings.label2id = {name: i for i, name in enumerate(labels)}
    torch.manual_seed(0)
    model = fresh(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    directory.mkdir(parents=True)
    made = Checkpoint(
        model.eval(), tokenizer(), list(labels), TransformLog(), Path("/nonexistent"), task=task
    )
    save(made, directory)
    return directory


def reload(made: Checkpoint, directory: Path) -> Checkpoint:
    """Save and load again."""
    directory.mkdir(parents=True, exist_ok=True)
    save(made, directory)
    return load(directory)


def batch(family: str = "bert", rows: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch of real sentences, input_ids and attention_mask (B, T)."""
    rng = random.Random(seed)
    texts = [sentence(rng, i % 2 == 0) for i in range(rows)]
    encoded = tokenizer(family)(texts, padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
