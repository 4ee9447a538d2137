"""onnxruntime sessions: made alike everywhere, so that their numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort

from kdcli import memory
from kdcli.errors import InputError, ResourceError, first_line
from kdcli.export import files
from kdcli.inputs import kinds
from kdcli.inputs.batching import Arrays

ort.disable_telemetry_events()  # of a Windows build, which reads no variable; see kdcli/__init__.py


def open_session(
    path: Path, *, threads: int, device: str = "cpu", spinning: bool = True
) -> ort.InferenceSession:
    """Open an ONNX file. The weights of a large one are mapped, not read: the same numbers in less memory.

    Args:
        path: The graph.
        threads: Threads inside one operator.
        device: ``cpu`` or ``cuda[:N]``.
        spinning: Whether idle threads wait actively. Several open sessions that spin slow each other
            about four times, so only one that is timed alone should.

    Raises:
        InputError: onnxruntime cannot read the graph.
        ResourceError: CUDA was asked for and this onnxruntime cannot use it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    providers: list[object] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise ResourceError(
                f"device '{device}' was asked for, but this onnxruntime has no CUDA provider",
                "install onnxruntime-gpu, or pass --device cpu",
            )
        number = device.partition(":")[2] or "0"
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    source: str | bytes = str(path)
    if is_large(path):
        source = files.referring(path)
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(path.resolve().parent))
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise InputError(f"onnxruntime cannot open {path}: {first_line(error)}") from error


def is_large(path: Path) -> bool:
    """Whether the weights of a graph are mapped and not read."""
    return path.is_file() and path.stat().st_size >= files.LARGE


@contextmanager
def running(
    path: Path, *, threads: int, device: str = "cpu", spinning: bool = True
) -> Iterator[Callable[[Arrays], np.ndarray]]:
    """Open an ONNX file for a while; of a large one the memory is given back at the end.

    Yields:
        The :func:`runner` of its session, of no use afterwards.
    """
    large = is_large(path)
    held = [runner(open_session(path, threads=threads, device=device, spinning=spinning))]
    try:
        yield lambda batch: held[0](batch)
    finally:
        held.clear()
        if large:
            memory.give_back()


def runner(session: ort.InferenceSession) -> Callable[[Arrays], np.ndarray]:
    """A function from a batch of (B, T) arrays to logits (B, C) that feeds only what the graph takes."""
    return lambda batch: session.run(None, fed(session, batch))[0]


def fed(session: ort.InferenceSession, batch: Arrays) -> dict[str, np.ndarray]:
    """What a graph takes of a batch of (B, T) arrays.

    What it asks for and the batch may lack is filled in.
    """
    return kinds.of(batch).filled(batch, [value.name for value in session.get_inputs()])


def predict(run: Callable[[Arrays], np.ndarray], batches: Sequence[tuple[np.ndarray, Arrays]]) -> np.ndarray:
    """Logits (N, C) in row order, from batches given as (row indices, arrays)."""
    rows = sum(len(index) for index, _ in batches)
    logits: np.ndarray | None = None
    for index, batch in batches:
        part = run(batch)
        if logits is None:
            logits = np.empty((rows, part.shape[1]), dtype=np.float32)
        logits[index] = part
    assert logits is not None, "no rows to predict"
    return logits
