"""onnxruntime's transformer fusions, made to work for models with uneven heads."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from kdcli.export import attention as attentions
from kdcli.export import files
from kdcli.export.quiet import quiet
from kdcli.families.family import Family

# One of these is at the heart of whatever can be fused: attention, layer norm, GELU.
_PARTS = frozenset({"Softmax", "LayerNormalization", "Erf"})


_LARGE = files.LARGE  # bytes of a file; smaller ones are not worth a detour over the disk
_WEIGHTS = "weights"

Fusion = Literal["packed", "separate", "none"]
"""How attention is fused: with the products of query, key and value inside, with these outside, or not at all
(then nothing else is either)."""


def possible(source: Path) -> bool:
    """Whether a graph holds anything that :func:`fuse` is for; convolutions and LSTMs are single operators."""
    graph = files.outline(source).graph
    return any(node.op_type in _PARTS for node in graph.node)


def fuse(
    source: Path,
    target: Path,
    *,
    embeddings: bool = True,
    attention: Fusion = "packed",
    fused_as: str = Family.fused_as,
) -> dict[str, int]:
    """Write ``source`` with attention, layer norms and GELUs as single operators of onnxruntime.

    Args:
        source: A float graph in plain ONNX.
        target: Where the fused graph goes; it runs in onnxruntime only.
        embeddings: Also fuse the embedding layer (an operator that cannot hold per-row scales).
        attention: Whether query, key and value become part of the attention operator.
        fused_as: The model type whose fusions are tried, as the family of the model says.

    Returns:
        How often each fused operator occurs, zeros left out.
    """
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        folder = None
        if source.stat().st_size < _LARGE:
            model = files.load(source)
        else:
            # The optimiser copies the graph again and again, so the weights wait in a file beside it.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent)))
            model = _put_aside(source, folder)
            stack.enter_context(contextlib.chdir(folder))  # where references to external data start
        make_head_counts_explicit(model.graph)
        options = FusionOptions(fused_as)
        options.enable_embed_layer_norm = embeddings
        options.use_multi_head_attention = attention == "separate"
        # opt_level 0: no session is made here; onnxruntime does its own constant folding when it loads.
        optimised = optimizer.optimize_model(
            model, model_type=fused_as, num_heads=0, hidden_size=0, opt_level=0, optimization_options=options
        )
        if attentions.fuse(optimised.model.graph):
            optimised.prune_graph()
        counts = optimised.get_fused_operator_statistics()
        merged = optimised.model
        del optimised, model
        gc.collect()
        _import_foreign(merged)
        if folder is None:
            files.save(merged, target)
        else:
            with files.mapped(folder / _WEIGHTS) as content:
                weights = files.aside(merged.graph, content)
                files.save(merged, target, weights=weights)
                del weights
    return {name: int(count) for name, count in counts.items() if count}


def _import_foreign(merged: onnx.ModelProto) -> None:
    if any(node.domain == "com.microsoft" for node in merged.graph.node):
        domains = {entry.domain for entry in merged.opset_import}
        if "com.microsoft" not in domains:
            merged.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _put_aside(source: Path, folder: Path) -> onnx.ModelProto:
    """The graph with the data of large initialisers in a file in ``folder``."""
    model, weights = files.view(source)
    offset = 0
    with (folder / _WEIGHTS).open("wb") as stream:
        for tensor in model.graph.initializer:
            if (values := weights.get(tensor.name)) is None:
                continue
            size = stream.write(values.data)
            tensor.raw_data = b""  # what says that the data are elsewhere wants to have seen some here
            set_external_data(tensor, _WEIGHTS, offset, size)
            tensor.ClearField("raw_data")
            offset += size
    return model


def make_head_counts_explicit(graph: GraphProto) -> int:
    """Write the number of heads where the exporter left -1, in place; return how many were written.

    transformers reshapes to ``(B, T, -1, head_size)``. The optimiser reads the number of heads off that
    shape, and gives up at -1; here it follows from the length of the bias that was just added. Each layer
    gets its own number, which is what makes unevenly pruned models fuse.
    """
    constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
    producer: dict[str, NodeProto] = {output: node for node in graph.node for output in node.output}

    def value(name: str) -> np.ndarray | None:
        if name in constants:
            return numpy_helper.to_array(constants[name])
        node = producer.get(name)
        if node is not None and node.op_type == "Constant":
            return numpy_helper.to_array(node.attribute[0].t)
        return None

    written = 0
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        shape, add = producer.get(node.input[1]), producer.get(node.input[0])
        if (
            shape is None
            or shape.op_type != "Concat"
            or len(shape.input) != 4
            or add is None
            or add.op_type != "Add"
        ):
            continue
        heads, size = value(shape.input[2]), value(shape.input[3])
        biases = [constants[name] for name in add.input if name in constants]
        if heads is None or size is None or heads.size != 1 or int(heads.flat[0]) != -1 or not biases:
            continue
        name = f"kdcli_heads_{written}"
        count = np.array([biases[0].dims[0] // int(size.flat[0])], dtype=np.int64)
        graph.initializer.append(numpy_helper.from_array(count, name))
        shape.input[2] = name
        written += 1
    return written
