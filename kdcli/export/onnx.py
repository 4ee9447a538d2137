"""From a classification model to a portable ONNX graph with dynamic batch and sequence.

Two routes through ``torch.onnx.export``. The TorchScript route takes about two seconds for a
six-layer encoder and its graph can be fused by onnxruntime; torch calls it legacy, and will take it
away one day. The ``torch.export`` route takes about twenty seconds and fuses less. kdcli uses the
first while torch has it and the second afterwards, says in the report which one it was, and tests both.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from kdcli import atomic
from kdcli.errors import InputError, ParityError
from kdcli.export import files
from kdcli.export.quiet import quiet
from kdcli.inputs import kinds

Route = Literal["torchscript", "dynamo"]

OPSET = 17  # LayerNormalization is one operator from here on; every maintained onnxruntime reads it
OUTPUT = "logits"

NOT_EXPORTED = (
    "it may still teach (kdcli distill --teacher MODEL), and kdcli evaluate --runtime torch measures it"
)
"""What is left to do with a model that has no ONNX form."""

_LARGE = files.LARGE


class _Logits(nn.Module):
    """Calls the model by input name and returns its logits (B, C) alone."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export(
    model: nn.Module, inputs: Mapping[str, Tensor], path: Path, *, route: Route | None = None
) -> Route:
    """Write ``model`` as an ONNX graph whose inputs have the dynamic dimensions of their kind, ``batch`` first.

    Args:
        model: A classifier that returns an object with ``logits`` (B, C); its mode is restored.
        inputs: One example batch without a dimension of 1, so that none is taken for a constant.
        path: The file to write.
        route: Which exporter; None takes the first that this torch has.

    Returns:
        The route that was used.

    Raises:
        InputError: The model cannot be exported, or the route needs a package that is not installed.
        ParityError: The graph that came out does not have the promised dimensions.
    """
    names = list(inputs)
    wrapper = _Logits(model, names)
    training = model.training
    wrapper.eval()  # a wrapper in training mode would switch dropout on again when the exporter is done
    used: Route = route or "torchscript"
    try:
        with quiet() as printed, torch.no_grad():
            try:
                _run(wrapper, inputs, path, used)
            except TypeError:
                if route is not None:
                    raise
                used = "dynamo"  # this torch no longer knows dynamo=False
                _run(wrapper, inputs, path, used)
    except ModuleNotFoundError as error:
        raise InputError(
            f"exporting through the '{used}' route needs the package '{error.name}'",
            'pip install "kdcli[dynamo]"',
        ) from error
    except Exception as error:
        reason = (str(error).strip() or printed.getvalue().strip() or type(error).__name__).splitlines()[0]
        reason = reason.partition(" (Could this error message be improved?")[0]
        raise InputError(f"the model cannot be exported to ONNX: {reason}", NOT_EXPORTED) from error
    finally:
        model.train(training)
    check_dimensions(path, names)
    return used


def _run(wrapper: nn.Module, inputs: Mapping[str, Tensor], path: Path, route: Route) -> None:
    names, kind = list(inputs), kinds.of(inputs)
    arguments = tuple(inputs.values())
    common: dict[str, Any] = {"input_names": names, "output_names": [OUTPUT]}
    if route == "torchscript":
        axes: dict[str, dict[int, str]] = {name: dict(kind.axes) for name in names}
        axes[OUTPUT] = {0: "batch"}
        with _weights_apart(wrapper) as weights, _no_dump():
            torch.onnx.export(
                wrapper, arguments, str(path), dynamo=False, dynamic_axes=axes, opset_version=OPSET, **common
            )
        if weights:
            _put_back(path, weights)
        return
    import onnxscript  # noqa: F401  torch asks for it late and in many words

    dims = {axis: torch.export.Dim(name, min=1) for axis, name in kind.axes.items()}
    shapes = {"inputs": tuple(dims for _ in names)}
    torch.onnx.export(
        wrapper, arguments, str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, **common
    )


@contextlib.contextmanager
def _no_dump() -> Iterator[None]:
    """Keep the exporter from printing its whole graph when it fails: torch 2.13 does so without being asked."""
    name: Any = "_jit_onnx_log"
    original = getattr(torch._C, name, None)
    if original is None:
        yield
        return
    setattr(torch._C, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(torch._C, name, original)


@contextlib.contextmanager
def _weights_apart(model: nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Let the exporter take the weights of a large model for inputs; yield what they are, by name.

    It would hold them twice more. How it hands them over is documented nowhere, so a torch whose exporter looks
    different writes them itself as before.
    """
    weights: dict[str, np.ndarray] = {}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    graph: Any = torch._C.Graph
    original = getattr(graph, "_export_onnx", None)
    if size < _LARGE or original is None:
        yield weights
        return

    def apart(self: Any, given: Any, *more: Any) -> Any:
        if isinstance(given, Mapping) and all(isinstance(t, Tensor) for t in given.values()):
            weights.update({name: tensor.detach().cpu().numpy() for name, tensor in given.items()})
            given = {}
        return original(self, given, *more)

    graph._export_onnx = apart
    try:
        yield weights
    finally:
        graph._export_onnx = original


def _put_back(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Turn those inputs of a graph into initialisers."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for value in [value for value in graph.input if value.name in weights]:
        values = weights[value.name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        graph.initializer.add(name=value.name, data_type=kind, dims=values.shape)
        graph.input.remove(value)
    files.save(model, path, weights=weights)


def check_dimensions(path: Path, names: Sequence[str]) -> None:
    """Check that every input has the dynamic dimensions of its kind.

    Raises:
        ParityError: An exporter turned a dynamic dimension into a constant or gave it another name.
    """
    graph = files.outline(path).graph
    found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    kind = kinds.of(names)
    # What a model takes and makes nothing of is no input of its graph.
    if set(found) - set(names) or set(names) - set(found) - kind.optional:
        raise ParityError(f"the exported graph has the inputs {sorted(found)}, not {sorted(names)}")
    for name, dims in found.items():
        if dims != list(kind.axes.values()):
            raise ParityError(
                f"input '{name}' of the exported graph has the dimensions {dims}, not {', '.join(kind.axes.values())}"
            )


def set_metadata(model: ModelProto, labels: Sequence[str], properties: Mapping[str, str]) -> None:
    """Store label names (JSON list under ``labels``) and further properties in the graph's metadata."""
    merged = {p.key: p.value for p in model.metadata_props}
    merged |= {"labels": json.dumps(list(labels), ensure_ascii=False), **properties}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(merged.items())))


def annotate(path: Path, labels: Sequence[str], properties: Mapping[str, str]) -> None:
    """Put label names and properties into the metadata of the graph at ``path``, in place."""
    model, weights = files.view(path)
    set_metadata(model, labels, properties)
    model.producer_name, model.producer_version = "kdcli", properties.get("kdcli_version", "")
    with atomic.replacing(path) as temporary:
        files.save(model, temporary, weights=weights)
        del weights  # some systems replace no file that is mapped
