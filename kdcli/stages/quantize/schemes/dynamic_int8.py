r"""Dynamic int8: weights as 8-bit integers with a scale a row, activations rounded at run time.

For a weight $W$ (O, I), row by row (an embedding table: entry by entry),

    s_o = \max_i |W_{oi}| / L \qquad q_{oi} = \mathrm{round}(W_{oi} / s_o) \qquad W_{oi} \approx q_{oi}\, s_o, \quad
    |W_{oi} - q_{oi}\, s_o| \le s_o / 2

with $L = 64$ (``reduce_range``) or $L = 127$, zero point 0, ties to even; with $b < 8$ ``bits``, $L = 2^{b-1} - 1$.
Tables always have $L = 127$. Activations are rounded to uint8 when they are known, with one scale and zero point
a tensor (in the ONNX graph: DynamicQuantizeLinear).

Why 64: x86 processors without VNNI multiply uint8 by int8 with VPMADDUBSW, which adds two products in 16 bits and
saturates above 32767 without a word: $2 \cdot 255 \cdot 64 = 32640$ fits, $2 \cdot 255 \cdot 127 = 64770$ does not.
Being a power of two, 64 also makes $s_o$ exact: quantising the rounded weights gives the same $q$ and $s$ again.
Tables are looked up and never multiplied, so they cannot saturate. One scale an entry and $L = 127$ moves the
logits of MiniLM on CLINC150 half as far as one scale a table does, or $L = 64$ (0.009 against 0.016 and 0.017).

The other way out is ``unsigned``: $L = 127$, and the graph holds $q + 128$ as uint8 with zero point 128. Products of
two uint8 are summed in 32 bits by every kernel, which is slower where VPMADDUBSW would have been used.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 2.1, with zero point 0; a scale a row as in
Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", arXiv:1806.08342.
The matrices are those of onnxruntime's ``quantize_dynamic(per_channel=True, reduce_range=...)``.
Differs: embeddings have a scale a row, where onnxruntime has one scale and zero point a table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.context import Applied, Context
from kdcli.export.int8 import quantise_graph
from kdcli.inputs import sampling
from kdcli.measure import environment
from kdcli.models.integers import Integers
from kdcli.report import metrics
from kdcli.stages.quantize import integer_weights
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import Scheme
from kdcli.stages.quantize.simulated import Simulation, answer
from kdcli.stages.quantize.smoothing import smoothquant

ROWS = 1000  # of validation, for a choice between forms of the weights


class Config(BaseModel):
    """Parameters of dynamic int8 quantisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: int = Field(
        8, ge=2, le=8, description="of a weight; the graph multiplies 8-bit integers whatever it is"
    )
    reduce_range: bool = Field(
        True, description="matrices within [-64, 64], so that no processor saturates; false: [-127, 127]"
    )
    unsigned: bool = Field(
        False, description="[-127, 127] as uint8 in the graph: no processor saturates, some are slower"
    )
    smooth: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="SmoothQuant's alpha: how much of the range of activations weights take over",
    )


def limit(config: Config) -> int:
    """L, the largest magnitude of an integer of a matrix."""
    if config.bits < 8:
        return (1 << (config.bits - 1)) - 1
    return 64 if config.reduce_range and not config.unsigned else 127


def quantise(weight: Tensor, config: Config) -> Integers:
    """Round a matrix (O, I) of finite floats to integers, each row with its own scale."""
    return rtn.symmetric(weight, config.bits, limit=limit(config))


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Round every weight by itself; no data is looked at, but where the processor leaves a choice."""
    config, hardware = hardware_choice(context, plan)
    plan = replace(plan, config=config)

    def matrix(name: str, layer: nn.Linear) -> Integers:
        return quantise(layer.weight, config)

    integers = integer_weights.quantise(plan, matrix)
    largest = integer_weights.largest_of(integers, plan)
    applied = integer_weights.finish(
        context,
        plan,
        integers,
        rounds="dynamic",
        reduce_range=config.reduce_range,
        detail={"largest": largest, "largest_pair_sum": 2 * 255 * largest, "hardware": hardware},
        warnings=[] if config.unsigned else integer_weights.saturation(largest),
    )
    assert applied.integers is not None
    integers.clear()
    stored = integer_weights.arrays(applied.integers)
    smooth = smoothquant.vectors(context.checkpoint.model)

    def rewrite(source: Path, target: Path) -> dict[str, Any]:
        return quantise_graph(source, target, stored, unsigned=config.unsigned, smooth=smooth)

    applied.rewrite_onnx = rewrite
    return applied


def hardware_choice(context: Context, plan: QuantizePlan) -> tuple[Any, dict[str, Any]]:
    """Which 8-bit form of the weights suits this processor: the plan's Config, perhaps changed, and why.

    With VNNI any form is exact, and the default of 7 bits is, everywhere. Without it 7 bits as int8 and 8 bits
    as uint8 are, and the one that keeps more accuracy on validation rows is taken, unless the user chose.
    """
    found = environment.isa()
    detail: dict[str, Any] = {"isa": found, "vnni": environment.has_vnni()}
    config = plan.config
    named = {"reduce_range", "unsigned"} & set(context.request.common.settings)
    if environment.has_vnni() or named or config.bits < 8:
        return config, detail
    validation = context.encoded["validation"]
    rows = sampling.judged(validation, ROWS, sampling.JUDGING_SEED, context.checkpoint.task)
    dense = {f"{name}.weight": layer.weight.detach().clone() for name, layer in plan.matrices.items()}
    base = answer(context.checkpoint, rows)
    scores = {}
    for name, unsigned in (("int8, 7 bits", False), ("uint8", True)):
        form = config.model_copy(update={"unsigned": unsigned, "reduce_range": not unsigned})
        integers = {n: quantise(weight, form) for n, weight in dense.items()}
        with Simulation(context.checkpoint, integers, dense, rounds="dynamic") as simulation:
            got = simulation.answers(simulation.layers, rows)
        scores[name] = (got.score, -base.divergence(got))
    # As accurate is good enough: the faster form comes first.
    best = max(scores, key=lambda name: (scores[name][0], name == "int8, 7 bits"))
    metric = metrics.of(context.checkpoint.task.primary)
    detail |= {
        metric.name: {name: metric.of_score(score[0]) for name, score in scores.items()},
        "chosen": best,
    }
    unsigned = best == "uint8"
    return config.model_copy(update={"unsigned": unsigned, "reduce_range": not unsigned}), detail


METHOD = Scheme(config=Config, apply=apply, rounds="dynamic")
