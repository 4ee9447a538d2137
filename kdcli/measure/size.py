"""Bytes on disk."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from kdcli.report.schema import Size

_CHUNK = 1 << 20


def measure(
    directory: Path,
    parameters: int | None,
    nonzero: int | None,
    graph: Path | None,
    beside: Sequence[Path] = (),
) -> Size:
    """Measure a checkpoint directory and its ONNX file.

    Args:
        directory: Holds the safetensors files.
        parameters: Number of weights, counted on the loaded model; None where there is none.
        nonzero: Those that are not zero.
        graph: The ONNX file, wherever it is; None where there is none.
        beside: The files of its external data, which count with it.
    """
    weights = sorted(directory.glob("*.safetensors"))
    shipped = [] if graph is None else [graph, *beside]
    return Size(
        parameters=parameters,
        nonzero_parameters=nonzero,
        checkpoint_bytes=sum(p.stat().st_size for p in weights) if weights else None,
        onnx_bytes=sum(p.stat().st_size for p in shipped) if shipped else None,
        onnx_gzip_bytes=sum(gzip_bytes(p) for p in shipped) if shipped else None,
    )


def gzip_bytes(path: Path) -> int:
    """Size of a file after gzip at its fastest level, streamed; shows what zeros are worth in an archive."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    total = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
