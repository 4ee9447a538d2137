"""A model that is known by its ONNX graph alone: a configuration and a tokenizer, and no weights that kdcli reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli import tasks
from kdcli.errors import InputError, first_line
from kdcli.models import checkpoint as checkpoints
from kdcli.models import foreign, inputs, safety, tokenizers, transforms
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.transforms import TransformLog
from kdcli.tasks.classification import CLASSIFICATION


class Unread(nn.Module):
    """Stands where the model would be: its configuration, without weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def has_weights(path: Path) -> bool:
    """Whether a directory has weights that kdcli reads."""
    return any(path.glob("*.safetensors"))


def is_one(checkpoint: Checkpoint) -> bool:
    """Whether it was read by :func:`load`."""
    return isinstance(checkpoint.model, Unread)


def load(path: Path, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Read what a graph needs beside itself: labels, lengths and the tokenizer. Weights are not looked at.

    Args:
        path: A directory with config.json and a tokenizer.
        device: Recorded as the place of the model; nothing is put there.

    Raises:
        InputError: The directory is broken or unsafe, or does not say what the labels are.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    files = safety.check_checkpoint(path, weights=False)
    try:
        with checkpoints.quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"config.json in {safety.show(path)} cannot be read: {first_line(error)}") from error
    names = foreign.labels_of(files.config, safety.show(path / "config.json"))
    if names is None:
        raise InputError(
            f"config.json in {safety.show(path)} names no labels, so kdcli cannot tell what the graph's numbers mean",
            "put them into id2label, in the order of the graph's output",
        )
    foreign.check_task(files.config, len(names), safety.show(path))
    known = tasks.recorded(files.config, safety.show(path / "config.json"))
    with checkpoints.quiet():
        tokenizer = tokenizers.load(path)
        try:
            with torch.device(
                "meta"
            ):  # its shapes alone: some tables of positions hold fewer than they have rows
                shapes = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
            tokenizer.model_max_length = inputs.longest(shapes, tokenizer)
        except (ValueError, RuntimeError):  # no classifier of transformers': the configuration says how long
            pass
    log = transforms.read_log(path) or TransformLog()
    return Checkpoint(
        Unread(config),
        tokenizer,
        names,
        log,
        path,
        placed=torch.device(device),
        task=known or CLASSIFICATION,
    )
