r"""Half precision: matrices and embedding tables as 16-bit floats, computed in 32 bits.

    w \approx \mathrm{fl}_{16}(w), \qquad |w - \mathrm{fl}_{16}(w)| \le 2^{-11} |w|
    \quad \text{for } 2^{-14} \le |w| \le 65504

to the nearest, ties to even. Vectors (biases, layer norms) stay as they are. Processors without half-precision
arithmetic widen the weights when the model is loaded: half the file, the latency and memory of before.

Source: IEEE 754-2019, binary16, section 3.6 and table 3.5; for weights of trained models Micikevicius et al. 2018,
"Mixed Precision Training", arXiv:1710.03740, section 3.
Differs: activations stay in 32 bits, because few operators of a CPU take 16.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kdcli.context import Applied, Context
from kdcli.errors import InputError
from kdcli.export.half import halve_graph
from kdcli.models.transforms import Quantise
from kdcli.report.schema import Method
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.scheme import Scheme


class Config(BaseModel):
    """Half precision has no parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def quantise(weight: Tensor) -> Tensor:
    """Round a tensor of any shape to float16.

    Raises:
        InputError: A weight is larger than float16 can hold.
    """
    rounded = weight.detach().half()
    if not bool(torch.isfinite(rounded).all()):
        largest = float(weight.abs().max())
        raise InputError(
            f"a weight of {largest:.3g} is beyond the 65504 of half precision",
            "keep that layer with --keep-fp32",
        )
    return rounded


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every matrix and table to float16. The result is dense: other stages may follow."""
    checkpoint = context.checkpoint
    table = []
    with torch.no_grad():
        for name, layer in plan.layers.items():
            rounded = quantise(layer.weight).float()
            norm = float(layer.weight.norm())
            error = float((layer.weight - rounded).norm()) / norm if norm else 0.0
            kind = "table" if name in plan.tables else "matrix"
            shape = list(layer.weight.shape)
            table.append({"name": name, "kind": kind, "shape": shape, "bits": 16, "relative_error": error})
            layer.weight.copy_(rounded)
    log = checkpoint.log
    log.transforms = [t for t in log.transforms if not isinstance(t, Quantise)]
    names = frozenset(f"{name}.weight" for name in plan.layers)
    count = sum(layer.weight.numel() for layer in plan.layers.values())
    detail = {"tensors": len(names), "stored": {"float16": count}}
    method = Method(name=plan.name, params=plan.params, detail=detail, layers=table)
    return Applied(checkpoint, method, half=names, rewrite_onnx=halve_graph, exact=True)


METHOD = Scheme(config=Config, apply=apply, embeddings="fp16", tables=("fp16", "fp32"))
