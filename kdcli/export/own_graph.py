"""Which ONNX file of a model is judged, and whether it gives the answers of the checkpoint beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli.errors import InputError, UsageError
from kdcli.export import classifier, files
from kdcli.inputs import batching, sampling
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models import graph_only
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.references import Resolved
from kdcli.report import metrics
from kdcli.report.schema import Warning_

FILE = "model.onnx"
HUB = f"onnx/{FILE}"
ROWS = 64
# Rounded weights or activations turn some answers round: at the export kdcli asks for 95 of 100 on rows that are not
# these. A float graph, half precision included, is far closer: of five families the largest difference of a
# probability was below 0.01.
_SAME, _SAME_FLOAT, _CLOSE = 0.9, 0.95, 0.05


@dataclass(frozen=True)
class Agreement:
    """How a graph answers, compared with a checkpoint."""

    rows: int
    same: int  # with the same answer
    largest: float  # difference of a probability, or of a number where that is the answer
    rounded: bool  # the graph computes with integers or rounded weights
    ordered: bool = False  # answers are numbers: pairs of rows agree, ``same`` is their share of the rows
    spread: float = 1.0  # that ``largest`` is held against: 1 of a probability, the deviation of numbers

    @property
    def differs(self) -> bool:
        """Whether they cannot be two forms of one model."""
        if self.rounded:
            return self.same < _SAME * self.rows
        return self.same < _SAME_FLOAT * self.rows or not self.largest <= _CLOSE * self.spread

    @property
    def words(self) -> str:
        """In part of a sentence."""
        if self.ordered:
            share = self.same / max(1, self.rows)
            return f"{share:.0%} of the pairs of rows in the same order, numbers differ by up to {self.largest:.2g}"
        return f"the same answer on {self.same} of {self.rows} rows, probabilities differ by up to {self.largest:.2g}"

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self) | {"differs": self.differs}


@dataclass
class Loaded:
    """A model to be judged."""

    checkpoint: Checkpoint
    graph: Path | None  # the file that is judged; None: it has none, and the checkpoint is exported
    warnings: list[Warning_]


def own_graph(directory: Path) -> Path | None:
    """The directory's own ONNX file: ``model.onnx``, or ``onnx/model.onnx`` as on the hub.

    Raises:
        InputError: It is a link that leaves the directory.
    """
    for name in (FILE, HUB):
        if (directory / name).is_file():
            _check_place(directory / name, directory)
            return directory / name
    return None


def load(found: Resolved, *, device: torch.device) -> Loaded:
    """Load a model for judging: by its own graph where there is one, and the checkpoint as far as there is one.

    Raises:
        InputError: There is neither a graph nor a checkpoint, or one of them is broken or unsafe.
    """
    path, warnings = found.path, list[Warning_]()
    graph = found.graph or own_graph(path)
    others = [one for one in sorted(path.glob("*.onnx")) if one != graph and one.name != FILE]
    if graph is None and not graph_only.has_weights(path) and len(others) == 1:
        graph, others = others[0], []
    if graph is None:
        if others and not graph_only.has_weights(path):
            names = ", ".join(one.name for one in others)
            raise InputError(f"{path} has several graphs and no {FILE}: {names}", "name one of these files")
        if others:
            message = (
                f"{others[0].name} in {path} was not judged, but an export of the checkpoint; "
                f"kdcli evaluate {others[0]} judges it"
            )
            warnings.append(Warning_(code="onnx-not-judged", message=message))
        return Loaded(checkpoints.load(path, device=device), None, warnings)
    if not graph_only.has_weights(path):
        return Loaded(graph_only.load(path, device=device), graph, warnings)
    try:
        return Loaded(checkpoints.load(path, device=device), graph, warnings)
    except InputError as error:
        if found.graph is None:
            raise
        # The file itself was named: it is judged without its neighbours.
        message = f"{graph.name} was not compared with the checkpoint in {path}: {error}"
        warnings.append(Warning_(code="onnx-not-compared", message=message))
        return Loaded(graph_only.load(path, device=device), graph, warnings)


def check(loaded: Loaded, runtimes: tuple[str, ...]) -> None:
    """Refuse what cannot be judged rightly before anything is measured.

    Raises:
        InputError: The graph's labels are not those of its configuration, or a file of its weights is missing.
        UsageError: torch was asked for, and there are no weights.
    """
    checkpoint, graph = loaded.checkpoint, loaded.graph
    if graph_only.is_one(checkpoint) and "torch" in runtimes:
        raise UsageError(
            f"{checkpoint.path} is judged by its graph alone, without weights, so torch cannot run it",
            "leave --runtime out",
        )
    if graph is None:
        return
    files.beside(graph)
    stored = classifier.stored_labels(graph)
    if stored is not None and stored != checkpoint.labels:
        raise InputError(
            f"{graph} says that its labels are {', '.join(stored)[:200]}, but config.json in {checkpoint.path} says "
            f"{', '.join(checkpoint.labels)[:200]}",
            "put the graph beside the configuration that it was made with",
        )


def agreement(checkpoint: Checkpoint, graph: Path, encoded: Encoded, *, threads: int) -> Agreement:
    """Compare the answers of a graph and of a checkpoint to some rows, one by one.

    Raises:
        InputError: The graph cannot be run as a classifier of these labels.
    """
    reference = torch_runner(checkpoint)
    at = sampling.positions(
        sampling.strata(encoded, checkpoint.task), len(encoded), ROWS, sampling.JUDGING_SEED
    )
    wanted, given = [], []
    with classifier.running(
        graph, threads=threads, labels=len(checkpoint.labels), task=checkpoint.task
    ) as run:
        for row in at:
            batch = batching.collate(encoded, [row], checkpoint.pad_id)
            wanted.append(reference(batch))
            given.append(run(batch))
    # The score of an answer that is no number is NaN, which is near to nothing.
    want, got = np.concatenate(wanted), np.concatenate(given)
    largest = np.abs(checkpoint.task.scores(want) - checkpoint.task.scores(got)).max()
    same = round(checkpoint.task.same(want, got) * len(at))
    ordered = metrics.of(checkpoint.task.primary).ordered
    spread = float(want.std()) or 1.0 if ordered else 1.0
    return Agreement(len(at), same, float(largest), classifier.rounds(graph), ordered, spread)


def differ(checkpoint: Checkpoint, graph: Path, found: Agreement, consequence: str) -> Warning_:
    """The warning for a graph that is not the checkpoint beside it."""
    return Warning_(
        code="onnx-differs-from-checkpoint",
        message=f"{named(checkpoint, graph)} does not belong to the checkpoint in {checkpoint.path}: {found.words}; "
        f"{consequence}",
    )


def named(checkpoint: Checkpoint, graph: Path) -> str:
    """A graph by its place in the model's directory; ``export`` for one that is not in it."""
    inside = graph.resolve().is_relative_to(checkpoint.path.resolve())
    return graph.resolve().relative_to(checkpoint.path.resolve()).as_posix() if inside else "export"


def _check_place(graph: Path, directory: Path) -> None:
    homes = [directory.resolve()]
    if homes[0].parent.name == "snapshots":  # the hub cache links into its blobs
        homes += [homes[0].parent.parent / "blobs", homes[0].parent.parent.parent / "blobs"]
    if not any(graph.resolve().is_relative_to(home) for home in homes):
        raise InputError(f"{graph} is a link that leaves the directory", "replace it by a copy of the file")
