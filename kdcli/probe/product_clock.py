"""How long single matrix products take in onnxruntime on this machine: one matrix against two thin ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdcli.context import Context
from kdcli.export import sessions
from kdcli.export.onnx import OPSET
from kdcli.measure import environment, latency, measurement

# A product of a small model takes some 20 microseconds: the least of several medians is what it costs
# when nothing else runs.
_ROUND: dict[str, Any] = {"warmup": 5, "min_runs": 30, "max_runs": 200, "max_seconds": 0.02}
_ROUNDS = 3


class Clock:
    """Milliseconds of products for one row of ``tokens`` tokens, each measured once."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._known: dict[tuple[int, ...], float] = {}

    @cached_property
    def threads(self) -> int:
        return environment.threads()

    def product(self, outputs: int, inputs: int, rank: int | None) -> float:
        """Of a linear layer (O, I) with bias, or of its factors."""
        widths = (inputs, outputs) if rank is None else (inputs, rank, outputs)
        return self._measured(widths)

    def table(self, features: int, rank: int | None) -> float:
        """Of the product behind a factorised table; a table alone costs next to nothing."""
        return 0.0 if rank is None else self._measured((rank, features))

    def model(self, context: Context) -> float:
        """Of the whole input model at batch 1, on rows of the training data."""
        assert context.input_graph is not None
        batches = measurement.latency_batches(context.encoded["train"], context.checkpoint.pad_id, 1)
        with sessions.running(context.input_graph, threads=self.threads) as run:
            samples = latency.collect(run, batches, max_seconds=2.0)
        return float(np.median(samples.milliseconds))

    def _measured(self, widths: tuple[int, ...]) -> float:
        if widths not in self._known:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / "product.onnx"
                onnx.save(_graph(widths), str(path))
                session = sessions.open_session(path, threads=self.threads)
            x = np.random.default_rng(0).normal(size=(1, self.tokens, widths[0])).astype(np.float32)
            self._known[widths] = _milliseconds(lambda _: session.run(None, {"x": x}))
        return self._known[widths]


def _graph(widths: tuple[int, ...]) -> onnx.ModelProto:
    """Products from the first width to the last, and a bias."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for at, (wide, next_) in enumerate(pairwise(widths)):
        values = rng.normal(size=(wide, next_)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{at}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{at}"], [f"y{at}"]))
        name = f"y{at}"
    weights.append(numpy_helper.from_array(np.zeros(widths[-1], dtype=np.float32), "b"))
    nodes.append(helper.make_node("Add", [name, "b"], ["y"]))
    shape = [1, "sequence"]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, widths[-1]])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    return model


@torch.no_grad()
def torch_milliseconds(layer: nn.Module, x: Tensor) -> float:
    """Of a layer that is no matrix product, in torch on its own device: the least of three medians."""

    def run(_: object) -> None:
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return _milliseconds(run)


def _milliseconds(run: Callable[[Any], object]) -> float:
    """The least of the medians of some rounds."""
    return min(float(np.median(latency.times(run, [{}], **_ROUND))) for _ in range(_ROUNDS))
