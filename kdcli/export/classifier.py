"""Any ONNX graph as a classifier of texts: what it takes, what it gives, and whether that can be told.

A graph made elsewhere has 32-bit inputs, lacks one, wants one more, has several outputs, or ends in a softmax.
What fits is run as its owner runs it; anything else is refused in words, before a number comes of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from kdcli import memory
from kdcli.errors import InputError, first_line
from kdcli.export import files, sessions
from kdcli.inputs.batching import Arrays
from kdcli.inputs.text import TEXT
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
# Some exporters want the mask as it enters the attention.
_MASKS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
_SCORES = ("tensor(float)", "tensor(float16)", "tensor(double)")
_LOGITS = "logits"
# Between a softmax and the output these change nothing but the form.
_PASSING = frozenset({"Identity", "Cast", "DequantizeLinear", "Reshape", "Squeeze", "Flatten"})
_ENDINGS = {
    "Softmax": "softmax",
    "QLinearSoftmax": "softmax",
    "Sigmoid": "sigmoid",
    "QLinearSigmoid": "sigmoid",
}
_TINY = np.finfo(np.float32).tiny  # a probability that was rounded to zero has a logarithm all the same


@dataclass(frozen=True)
class Signature:
    """How a graph is run as a classifier."""

    inputs: dict[str, Any]  # name -> numpy type that it is given as
    output: str
    ending: str | None  # "softmax" or "sigmoid", the last that it computes


def signature(session: ort.InferenceSession, path: Path) -> Signature:
    """Find out how a graph takes texts and gives its answers.

    Raises:
        InputError: It takes or gives something else, or only batches of one shape.
    """
    takes: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name not in TEXT.names:
            raise InputError(
                f"{path} asks for the input '{value.name}', which a tokenizer does not give; "
                f"{', '.join(TEXT.names)} are allowed",
                "export the model with these inputs alone",
            )
        kinds = _TYPES | (_MASKS if value.name == TEXT.masking else {})
        if value.type not in kinds:
            raise InputError(f"{path} wants '{value.name}' as {value.type}; {', '.join(kinds)} are allowed")
        _free(value, path)
        takes[value.name] = kinds[value.type]
    if TEXT.main not in takes:
        raise InputError(
            f"{path} is not a graph of a text classifier: it has no input '{TEXT.main}' "
            f"(its inputs: {', '.join(takes) or 'none'})"
        )
    output = _output(session, path)
    return Signature(takes, output, _ending(path, output))


def _free(value: Any, path: Path) -> None:
    """Refuse an input whose batch or length is fixed."""
    shape = value.shape or []
    if shape and len(shape) != 2:
        raise InputError(
            f"input '{value.name}' of {path} has {len(shape)} dimensions, not batch and sequence"
        )
    for name, size in zip(("batch", "sequence"), shape, strict=False):
        if isinstance(size, int):
            raise InputError(
                f"input '{value.name}' of {path} has the fixed {name} of {size}; kdcli judges graphs that take any",
                "export the model with dynamic axes for batch and sequence",
            )


def _output(session: ort.InferenceSession, path: Path) -> str:
    outputs = session.get_outputs()
    names = [value.name for value in outputs]
    fitting = [value.name for value in outputs if value.type in _SCORES and len(value.shape or [0, 0]) == 2]
    if _LOGITS in fitting:
        return _LOGITS
    if len(fitting) == 1:
        return fitting[0]
    said = ", ".join(f"'{value.name}' {value.type} of shape {value.shape}" for value in outputs)
    if not fitting:
        raise InputError(
            f"{path} is not a graph of a text classifier: no output has a number for every label; it has {said}",
            "export the model with its classification head",
        )
    raise InputError(
        f"{path} has several outputs that could be its answer ({', '.join(names)}), none named logits"
    )


def _ending(path: Path, output: str) -> str | None:
    """What makes the output of logits."""
    makers = {name: node for node in files.outline(path).graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in _PASSING:
        node = makers.get(node.input[0])
    return None if node is None else _ENDINGS.get(node.op_type)


@contextmanager
def running(
    path: Path, *, threads: int, device: str = "cpu", labels: int | None = None, task: Task = CLASSIFICATION
) -> Iterator[Callable[[Arrays], np.ndarray]]:
    """Open a graph for a while, as :func:`kdcli.export.sessions.running` does.

    Args:
        path: The graph.
        threads: Threads inside one operator.
        device: ``cpu`` or ``cuda[:N]``.
        labels: How many numbers a row must get.
        task: What they are.

    Yields:
        A function from a batch of (B, T) arrays to logits (B, C), float32. Probabilities become their logarithms,
        whose softmax they are; what a sigmoid gave becomes what the task reads as that.

    Raises:
        InputError: The graph is no text classifier, gives another kind of answer, or stops on a batch.
    """
    held = [sessions.open_session(path, threads=threads, device=device)]
    try:
        how = signature(held[0], path)
        if how.ending == "sigmoid" and task.of_sigmoid(np.empty((0, 1), np.float32)) is None:
            raise InputError(
                f"{path} ends in a sigmoid: it says yes or no to every label, and this model chooses one of them",
                "if several labels can hold, say multi_label_classification in problem_type of its config.json",
            )

        def run(batch: Arrays) -> np.ndarray:
            given = TEXT.filled(batch, how.inputs)
            fed = {name: given[name].astype(kind, copy=False) for name, kind in how.inputs.items()}
            rows, tokens = TEXT.shape(batch)
            try:
                scores: np.ndarray = held[0].run([how.output], fed)[0]
            except Exception as error:  # onnxruntime's errors share no base class but Exception
                raise InputError(
                    f"{path} stops on {rows} rows of {tokens} tokens: {first_line(error)}",
                    "it must belong to this tokenizer, and take any number of rows and tokens",
                ) from error
            _check_scores(scores, rows, labels, path)
            scores = scores.astype(np.float32, copy=False)
            if how.ending == "sigmoid":
                read = task.of_sigmoid(scores)
                assert read is not None
                return read
            return np.log(np.maximum(scores, _TINY)) if how.ending == "softmax" else scores

        yield run
    finally:
        held.clear()
        if sessions.is_large(path):
            memory.give_back()


def _check_scores(scores: np.ndarray, rows: int, labels: int | None, path: Path) -> None:
    if scores.ndim != 2 or scores.shape[0] != rows:
        raise InputError(
            f"{path} gives {scores.shape} numbers for {rows} rows, not one list of numbers a row"
        )
    if labels is not None and scores.shape[1] != labels:
        raise InputError(
            f"{path} gives {scores.shape[1]} numbers a row, but its configuration names {labels} labels",
            "the graph belongs to another model; put it beside its own config.json",
        )


def stored_labels(path: Path) -> list[str] | None:
    """The label names that kdcli put into a graph's metadata; None in a graph of others."""
    stored = next((p.value for p in files.outline(path).metadata_props if p.key == "labels"), None)
    try:
        names = None if stored is None else json.loads(stored)
    except (ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


_ROUNDING = re.compile(r"Quantize|Integer|NBits|^QLinear|^(QAttention|QGemm|QEmbedLayerNormalization)$")


def rounds(path: Path) -> bool:
    """Whether a graph computes with integers or rounded weights: then it only nearly gives a checkpoint's answers."""
    return any(_ROUNDING.search(node.op_type) for node in files.outline(path).graph.node)
