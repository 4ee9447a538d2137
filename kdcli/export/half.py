"""Matrices as float16 in the file, widened to float32 when a session is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kdcli.export import files


def halve_graph(source: Path, target: Path) -> dict[str, Any]:
    """Write ``source`` with a Cast in front of every matrix that half precision holds without loss.

    The checkpoint's matrices were rounded to float16 before, so these are they; whatever was kept in fp32 has
    more digits and stays. Runtimes fold the Cast of a constant when they load the file.

    Returns:
        ``stored`` and ``executed``: in words, how many weights.
    """
    model, weights = files.view(source)
    graph = model.graph
    halved, casts = 0, []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        dense = files.values(tensor, weights)
        with np.errstate(over="ignore"):
            small = dense.astype(np.float16)
        if not np.array_equal(small.astype(np.float32), dense):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(small, f"{name}_float16"))
        casts.append(
            helper.make_node("Cast", [tensor.name], [name], name=f"{name}_widen", to=TensorProto.FLOAT)
        )
        halved += dense.size
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    files.save(model, target, weights=weights)
    return {"stored": {"float16": halved}, "executed": {"float, widened on loading": halved}}
