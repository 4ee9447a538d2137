"""Bytes on disk."""

from __future__ import annotations

import zlib
from pathlib import Path

from kdcli.report.schema import Size

_CHUNK = 1 << 20


def measure(directory: Path, parameters: int, nonzero: int, graph: Path | None) -> Size:
    """Measure a checkpoint directory and its ONNX file.

    Args:
        directory: Holds the safetensors files.
        parameters: Number of weights, counted on the loaded model.
        nonzero: Those that are not zero.
        graph: The ONNX file, wherever it is; None where there is none.
    """
    return Size(
        parameters=parameters,
        nonzero_parameters=nonzero,
        checkpoint_bytes=sum(p.stat().st_size for p in directory.glob("*.safetensors")),
        onnx_bytes=None if graph is None else graph.stat().st_size,
        onnx_gzip_bytes=None if graph is None else gzip_bytes(graph),
    )


def gzip_bytes(path: Path) -> int:
    """Size of a file after gzip at its fastest level, streamed; shows what zeros are worth in an archive."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    total = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
