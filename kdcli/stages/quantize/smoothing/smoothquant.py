r"""SmoothQuant: move the range of activations into the weights that read them, column by column.

For an input $x$ (I features) and the matrices $W$ that read it, all of them together,

    s_j = \frac{\max |x_j|^\alpha}{\max |W_{oj}|^{1 - \alpha}}
    \qquad y = \bigl(W\, \mathrm{diag}(s)\bigr) \bigl(\mathrm{diag}(1/s)\, x\bigr)

The product is the same, but features with outliers become smaller before they are rounded with one scale for
all, and the weights, which have a scale a row, become larger there. $\alpha = 0.5$ gives either the same range;
more takes more from the activations.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML, arXiv:2211.10438, equations 3 and 4.
Differs: the paper folds $1/s$ into the layer norm in front. In BERT the layer norm stands behind the residual sum,
so its output is read by that sum as well, and the division has to be carried out; only the factors of the
attention output fold, into the rows of the value projection. Features that are zero on all calibration rows, or
that no weight reads, keep $s = 1$.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli import families
from kdcli.context import Context
from kdcli.families.modules import SmoothLinear
from kdcli.families.stack import encoder_layers
from kdcli.models import transforms
from kdcli.models.transforms import Smooth
from kdcli.registry import MethodSpec
from kdcli.stages.quantize.layer_inputs import observe
from kdcli.stages.quantize.plan import QuantizePlan

SMALLEST = 1e-5  # as in the published code


class Config(BaseModel):
    """Parameters of SmoothQuant."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    smooth: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="alpha: how much of the range of activations weights take over; 0 turns it off",
    )


def factors(largest: Tensor, weights: Sequence[Tensor], config: Config) -> Tensor:
    """How much each input feature is divided by, and each column of the weights multiplied.

    Args:
        largest: (I,) largest magnitude of every input feature over the calibration rows, at least 0.
        weights: Every matrix (O, I) that reads this input; O may differ.
        config: Alpha.

    Returns:
        s, (I,) float32, positive.
    """
    columns = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    largest = largest.float()
    alpha = config.smooth
    found = largest.clamp(min=SMALLEST) ** alpha / columns.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), found.clamp(min=SMALLEST), torch.ones_like(found))


class _Largest:
    """Largest magnitude of every feature (I,) of a stream of (..., I)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in a batch without padding."""
        found = values.flatten(0, -2).abs().amax(0)
        self.value = found if self.value is None else torch.maximum(self.value, found)


@torch.no_grad()
def smooth(context: Context, plan: QuantizePlan, alpha: float) -> dict[str, Any]:
    """Smooth the inputs of the plan's matrices in place; in full precision the answers stay the same.

    Layers that read the same tensor, as query, key and value do, share one vector. The factors of the attention
    output go into the rows of the value projection and cost nothing; all others are a multiplication, which
    :class:`SmoothLinear` carries out and the log of transforms records.

    Args:
        context: Its checkpoint is changed in place, weights and log.
        plan: Its matrices are smoothed.
        alpha: Between 0 and 1.

    Returns:
        For the report: how many layers were smoothed in which way, and by how much.
    """
    model, log = context.checkpoint.model, context.checkpoint.log
    config = Config(smooth=alpha)
    rows = plan.options.calibration_samples
    seen = observe(context, plan.matrices, rows, _Largest, _Largest.add, title="smoothing")
    folded = _fold_into_values(context, plan, seen, config)
    groups: dict[int, list[str]] = {}
    for name, collector in seen.items():
        if name not in folded:
            groups.setdefault(id(collector), []).append(name)
    layers: list[str] = []
    spread = []
    for names in groups.values():
        largest = seen[names[0]].value
        assert largest is not None
        found = factors(largest, [plan.matrices[n].weight for n in names], config)
        spread.append(float(found.max() / found.min()))
        for name in names:
            layer = transforms.smooth(model, name)
            layer.weight.mul_(found)
            layer.smooth.div_(found)
            layers.append(name)
    log.transforms = [t for t in log.transforms if not isinstance(t, Smooth)]
    log.transforms.append(Smooth(layers=[n for n, m in model.named_modules() if isinstance(m, SmoothLinear)]))
    return {
        "alpha": alpha,
        "multiplied": len(layers),
        "vectors": len(groups),
        "folded": len(folded),
        "largest_ratio_of_factors": round(max(spread, default=1.0), 3),
    }


def vectors(model: nn.Module) -> dict[str, np.ndarray]:
    """Weight -> what its input is multiplied by, for the writers of graphs."""
    return {
        f"{name}.weight": module.smooth.detach().float().cpu().numpy()
        for name, module in model.named_modules()
        if isinstance(module, SmoothLinear)
    }


def _fold_into_values(
    context: Context, plan: QuantizePlan, seen: dict[str, _Largest], config: Config
) -> set[str]:
    """Divide rows of value projections by the factors of the attention outputs behind them; who was folded."""
    checkpoint = context.checkpoint
    if not families.is_encoder(checkpoint.model_type):
        return set()
    names = {id(module): name for name, module in checkpoint.model.named_modules()}
    folded = set()
    for layer in encoder_layers(checkpoint.model, checkpoint.family):
        if not layer.heads:
            continue
        value, output = layer.value, layer.attention_output
        name = names[id(output)]
        if name not in seen or not isinstance(value, nn.Linear) or not isinstance(output, nn.Linear):
            continue  # kept in float, or a pair of factors
        largest = seen[name].value
        assert largest is not None
        found = factors(largest, [output.weight], config)
        output.weight.mul_(found)
        value.weight.div_(found[:, None])
        if value.bias is not None:
            value.bias.div_(found)
        folded.add(name)
    return folded


METHOD = MethodSpec(config=Config)
