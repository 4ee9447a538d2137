"""From a checkpoint to the ``model.onnx`` that ships: export, parity, fusion, parity again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from kdcli import __version__, cache, families
from kdcli.errors import InputError, ParityError, first_line
from kdcli.export import files, fusion, onnx, own_graph, parity, runtimes, sessions
from kdcli.export.fusion import Fusion
from kdcli.inputs import batching, kinds, sampling
from kdcli.inputs.feeding import model_inputs, torch_runner
from kdcli.inputs.text import Encoded
from kdcli.models import activations
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.report.schema import Parity, Warning_
from kdcli.tasks.task import Task
from kdcli.timing import Timings

FILE = own_graph.FILE
_SAID = 160  # characters of what onnxruntime says: it goes on with paths and numbers of its source


@dataclass
class Graph:
    """A finished ONNX file and how it came about."""

    path: Path
    parity: Parity
    detail: dict[str, Any] = field(default_factory=dict)
    warnings: list[Warning_] = field(default_factory=list)


def parity_batches(encoded: Encoded, pad_id: int, limit: int) -> list[dict[str, np.ndarray]]:
    """Real rows at the shapes that go wrong: single short and long ones, mixed lengths, extra padding.

    None is wider than ``limit`` tokens.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    shortest, longest, middle = order[:1], order[-1:], order[len(order) // 2 : len(order) // 2 + 1]
    spread = order[np.unique(np.linspace(0, len(order) - 1, 8).astype(int))]
    longest_row = int(encoded.lengths[spread].max())
    wide = max(longest_row, min(longest_row + 5, limit))  # there may be no position for more
    groups: list[tuple[np.ndarray, int | None]] = [
        (shortest, None),
        (middle, None),
        (longest, None),
        (spread, None),
    ]
    return [batching.collate(encoded, rows, pad_id, width=width) for rows, width in groups] + [
        batching.collate(encoded, spread[:3], pad_id, width=wide)
    ]


def build(
    checkpoint: Checkpoint,
    target: Path,
    encoded: Encoded,
    *,
    threads: int,
    timings: Timings,
    progress: Progress,
    rewrite: Callable[[Path, Path], dict[str, Any]] | None = None,
    attention: Fusion = "packed",
    exact: bool = False,
    properties: Mapping[str, str] | None = None,
) -> Graph:
    """Export ``checkpoint`` to ``target`` and prove that it answers as the checkpoint does.

    The plain graph is checked first; the fused one replaces it only where it agrees as well. With
    ``rewrite`` (quantisation) the float graph is an intermediate step, and the integer graph must
    give the same answers, or with ``exact`` the same logits.

    Raises:
        ParityError: The exported graph does not agree with the checkpoint.
    """
    names = inputs_of(checkpoint, encoded)
    plain = target.with_name("plain.onnx")
    fused = target.with_name("fused.onnx")
    batches = parity_batches(encoded, checkpoint.pad_id, checkpoint.max_length)
    rounding = torch_runner(checkpoint)

    def reference(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        with activations.paused(checkpoint.model):  # the float graph rounds nothing yet
            return rounding(batch)

    warnings: list[Warning_] = []
    try:
        with timings.phase("export"):
            example = kinds.of(names).example(
                int(checkpoint.config.vocab_size), names, checkpoint.device, tokens=checkpoint.max_length
            )
            with activations.paused(checkpoint.model):
                route = onnx.export(checkpoint.model, example, plain)
        detail: dict[str, Any] = {"exporter": route, "opset": onnx.OPSET, "fused": {}}
        with timings.phase("parity"):
            try:
                result = _check(reference, plain, batches, threads, checkpoint.task)
            except _NotRunError as error:
                raise InputError(
                    f"the model cannot be exported to ONNX: {error}", onnx.NOT_EXPORTED
                ) from error
        if not result.passed:
            raise ParityError(
                f"the ONNX export is off by {result.max_abs_diff} from the checkpoint, allowed are {result.tolerance}"
            )
        chosen = plain
        with timings.phase("fusion"):
            counts = {}
            if attention != "none":
                counts = fusion.fuse(
                    plain,
                    fused,
                    embeddings=rewrite is None,
                    attention=attention,
                    fused_as=families.presumed(checkpoint.model_type).fused_as,
                )
        with timings.phase("parity"):
            try:
                fused_result = _check(reference, fused, batches, threads, checkpoint.task) if counts else None
            except _NotRunError:  # the plain graph does run
                fused_result = None
        if fused_result is not None and fused_result.passed:
            chosen, result, detail["fused"] = fused, fused_result, counts
        elif attention != "none" and fusion.possible(plain):
            reason = (
                "nothing fused"
                if not counts
                else "onnxruntime does not run the fused graph"
                if fused_result is None
                else f"fused logits differ by {fused_result.max_abs_diff}"
            )
            warnings.append(Warning_(code="not-fused", message=f"the ONNX graph is not fused: {reason}"))
        if rewrite is not None:
            with timings.phase("rewrite"):
                detail |= rewrite(chosen, target)
            with timings.phase("parity"):
                many = _many(encoded, checkpoint)
                result = _check(rounding, target, many, threads, checkpoint.task, exact=exact)
            if not result.passed:
                if exact:
                    raise ParityError(
                        f"the integer graph is off by {result.max_abs_diff} from the checkpoint, "
                        f"allowed are {result.tolerance}"
                    )
                raise ParityError(
                    f"the integer graph gives the checkpoint's answer for {result.top1_agreement:.1%} of the rows only"
                )
        else:
            chosen.replace(target)
        with timings.phase("export"):
            detail["oldest_onnxruntime"] = needed = runtimes.of_graph(files.outline(target))
            meta = {
                "kdcli_version": __version__,
                "max_length": str(checkpoint.max_length),
                **({} if needed is None else {"oldest_onnxruntime": needed}),
                **checkpoint.task.about(len(checkpoint.labels)),
                **(properties or {}),
            }
            onnx.annotate(target, checkpoint.labels, meta)
    finally:
        for path in (plain, fused):
            path.unlink(missing_ok=True)
    return Graph(target, result, detail, warnings)


class _NotRunError(ParityError):
    """onnxruntime does not run a graph; the first line of what it said."""


def of_teacher(
    checkpoint: Checkpoint, encoded: Encoded, *, threads: int, timings: Timings, progress: Progress
) -> tuple[Path | None, list[Warning_]]:
    """As :func:`of_input`, but None where there is no graph that agrees: torch can give a teacher's answers too."""
    try:
        return of_input(checkpoint, encoded, threads=threads, timings=timings, progress=progress)
    except (InputError, ParityError) as error:
        message = f"the input has no ONNX form, so its answers and times are those of torch: {error}"
        return None, [Warning_(code="measured-in-torch", message=message)]


def of_input(
    checkpoint: Checkpoint, encoded: Encoded, *, threads: int, timings: Timings, progress: Progress
) -> tuple[Path, list[Warning_]]:
    """The ONNX form of a checkpoint that came in: kdcli's own ``model.onnx``, else an export kept in the cache.

    A ``model.onnx`` that is not the checkpoint's, because somebody put it there, is left alone with a warning: a stage
    works on the checkpoint.
    """
    warnings = []
    if (own := own_graph.own_graph(checkpoint.path)) is not None:
        instead = "the stage works on the checkpoint, and 'before' is an export of it"
        try:
            with timings.phase("parity"):
                found = own_graph.agreement(checkpoint, own, encoded, threads=threads)
        except InputError as error:
            message = f"{own_graph.named(checkpoint, own)} of the input cannot be run ({error}); {instead}"
            warnings.append(Warning_(code="onnx-not-compared", message=message))
        else:
            if found.differs:
                warnings.append(own_graph.differ(checkpoint, own, found, instead))
            elif checkpoint.by_kdcli:
                return own, []
    name = cache.key(
        model=checkpoints.weights_digest(checkpoint.path),
        labels=checkpoint.labels,
        inputs=inputs_of(checkpoint, encoded),
        code=cache.code(),
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
    )
    place = cache.entry("onnx", name)
    if not cache.intact(place):
        with cache.writing(place) as temporary:
            graph = build(
                checkpoint, temporary / FILE, encoded, threads=threads, timings=timings, progress=progress
            )
        return place / FILE, [*warnings, *graph.warnings]
    return place / FILE, warnings


def inputs_of(checkpoint: Checkpoint, encoded: Encoded) -> list[str]:
    """What the graph asks for: what the model takes of what its tokenizer gives, no more."""
    return list(model_inputs(checkpoint.model, batching.collate(encoded, [0], checkpoint.pad_id), "cpu"))


def _check(
    reference: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    path: Path,
    batches: Sequence[Mapping[str, np.ndarray]],
    threads: int,
    task: Task,
    *,
    exact: bool = True,
) -> Parity:
    try:
        with sessions.running(path, threads=threads, spinning=False) as run:
            return parity.compare(reference, run, batches, exact=exact, task=task)
    except Exception as error:  # onnxruntime's errors have no common base
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise _NotRunError(f"onnxruntime does not run the graph ({first_line(error)[:_SAID]})") from error


def _many(encoded: Encoded, checkpoint: Checkpoint) -> list[dict[str, np.ndarray]]:
    """64 rows one by one, because the activation scale of an integer graph depends on the whole batch."""
    rows = sampling.sample(encoded, 64, sampling.JUDGING_SEED, checkpoint.task)
    return [batching.collate(rows, [i], checkpoint.pad_id) for i in range(len(rows))]
