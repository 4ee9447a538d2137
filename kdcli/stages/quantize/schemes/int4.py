r"""Weight-only int4: integers of 4 bits with a scale for every block of columns, activations in float.

For each row of a weight $W$ (O, I) and each block $g$ of ``group`` columns, ``symmetric`` or not,

    \text{symmetric: } W_{oi} \approx q_{oi}\, s_{og}, \qquad s_{og} = \max |W| / 7, \qquad q \in [-7, 7] \\
    \text{otherwise: } W_{oi} \approx (q_{oi} - z_{og})\, s_{og}, \qquad s_{og} = (\max W - \min W) / 15,
    \qquad q \in [-8, 7]

with max and min over the block, zero included. ``bits`` says how many bits an integer has, ``rounding`` who chooses
$q$, $s$ and $z$: ``rtn`` rounds to the nearest and looks at nothing else, ``hqq`` minimises a sparse error of the
weights, ``gptq`` the error of the layer's output on calibration rows. With GPTQ the divergence from the answers of
MiniLM on CLINC150 is 0.0017 nats with zero points and 0.0034 without; rounding to the nearest with zero points
gives 0.0076.

Source: Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
Transformers", arXiv:2206.01861, section 4.1 (group-wise weights); formula as in Jacob et al. 2018, arXiv:1712.05877,
eq. 1.
Differs: activations are not rounded, unless ``compute`` is int8: then onnxruntime rounds them to 8 bits block by
block. A block is the largest power of two, at most ``group`` and at least 16, that divides I; where there is none, a
row has one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from kdcli import registry
from kdcli.context import Applied, Context
from kdcli.errors import UsageError, did_you_mean
from kdcli.export.int8 import quantise_graph
from kdcli.export.runtimes import PACKED_BITS
from kdcli.inputs.feeding import model_inputs
from kdcli.models.integers import Integers, group_of
from kdcli.probe import in_order
from kdcli.stages.quantize import integer_weights, layer_inputs
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import OfInputs, Scheme

_BATCH = 8
_WIDEST = 256  # columns of a block that runtimes have kernels for


class Config(BaseModel):
    """Parameters of weight-only quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: int = Field(4, ge=2, le=8, description="of a weight")
    group: int = Field(64, ge=16, description="columns that share a scale, rounded down to a power of two")
    symmetric: bool = Field(True, description="no zero points: smaller, and read by more programs")
    rounding: str = Field("gptq", description="who chooses integers and scales: rtn, hqq or gptq")
    compute: Literal["float", "int8"] = Field(
        "float", description="activations in the product: int8 is faster with VNNI and less exact"
    )

    @field_validator("rounding")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (known := registry.names("rounding")):
            raise ValueError(f"unknown rounding '{value}': {did_you_mean(value, known)}")
        return value


def group(weight: Tensor, config: Config) -> int | None:
    """Columns of a block of a weight (O, I)."""
    return group_of(weight.shape[1], config.group)


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse blocks that no runtime has a kernel for."""
    if plan.config.group & (plan.config.group - 1) or plan.config.group > _WIDEST:
        raise UsageError(f"--set group={plan.config.group}: blocks have 16, 32, 64, 128 or 256 columns")


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every weight of the plan."""
    config, rounding = plan.config, plan.rounding
    assert rounding is not None
    detail: dict[str, Any] = {}
    found: dict[str, Integers] = {}
    if rounding.of_inputs is not None and plan.matrices:
        found = _in_order(context, plan, rounding.of_inputs)
        detail["calibration_rows"] = min(plan.options.calibration_samples, len(context.encoded["train"]))

    def matrix(name: str, layer: nn.Linear) -> Integers:
        if name in found:
            return found[name]
        assert rounding.of_weight is not None
        blocks = group(layer.weight, config)
        return rounding.of_weight(layer.weight, config.bits, blocks, plan.inner, symmetric=config.symmetric)

    integers = integer_weights.quantise(plan, matrix)
    arrays = integer_weights.arrays({name: m.cpu() for name, m in integers.items()})
    level = 4 if config.compute == "int8" else 0

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, arrays, kernel="blocks", accuracy_level=level)

    return integer_weights.finish(
        context,
        plan,
        integers,
        rewrite=rewrite,
        detail=detail,
        fusion="separate",
        exact=config.compute == "float",
    )


def _in_order(context: Context, plan: QuantizePlan, rounding: OfInputs) -> dict[str, Integers]:
    """Layer after layer, on the inputs that tables and layers give that are rounded already."""
    made: dict[str, Integers] = {}
    model, config = context.checkpoint.model, plan.config

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in layer_inputs.calibration_batches(context, plan.options.calibration_samples, _BATCH):
            yield model_inputs(model, batch, context.device)

    def take(name: str, products: Tensor) -> None:
        weight = plan.matrices[name].weight
        made[name] = rounding(
            weight, products, config.bits, group(weight, config), plan.inner, symmetric=config.symmetric
        )
        with torch.no_grad():
            weight.copy_(made[name].dense())

    before = {name: layer.weight.detach().clone() for name, layer in plan.layers.items()}
    order = in_order.order_of(model, plan.matrices, next(batches()))
    walk = in_order.Walk(model, order, batches)
    try:
        with torch.no_grad():
            for table in plan.tables.values():
                table.weight.copy_(rtn.table(table.weight, plan.embeddings).dense())
        with context.progress.task(plan.config.rounding, len(order.groups)) as task:
            for together in order.groups:
                products = walk.products(together, plan.matrices)
                for name in together.names:
                    take(name, products)
                task.advance()
        for name in set(plan.matrices) - set(made):
            columns = plan.matrices[name].in_features
            take(name, torch.zeros(columns, columns, device=context.device))  # it never runs
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                plan.layers[name].weight.copy_(weight)
    return made


def operators(config: Config) -> tuple[str, ...]:
    """The product of packed integers."""
    return (f"MatMulNBits, {PACKED_BITS[config.bits]} bits",)


METHOD = Scheme(
    config=Config, apply=apply, check=check, rounds="none", embeddings="int4", operators=operators
)
