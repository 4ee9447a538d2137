"""SmoothQuant before a quantisation: which layers share factors, and where the factors go."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import families
from kdcli.context import Context
from kdcli.families.modules import SmoothLinear
from kdcli.families.stack import encoder_layers
from kdcli.models import transforms
from kdcli.models.transforms import Smooth
from kdcli.stages.quantize.observed import observe
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.schemes import smoothquant


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
    config = smoothquant.Config(smooth=alpha)
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
        factors = smoothquant.factors(largest, [plan.matrices[n].weight for n in names], config)
        spread.append(float(factors.max() / factors.min()))
        for name in names:
            layer = transforms.smooth(model, name)
            layer.weight.mul_(factors)
            layer.smooth.div_(factors)
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
    context: Context, plan: QuantizePlan, seen: dict[str, _Largest], config: smoothquant.Config
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
        factors = smoothquant.factors(largest, [output.weight], config)
        output.weight.mul_(factors)
        value.weight.div_(factors[:, None])
        if value.bias is not None:
            value.bias.div_(factors)
        folded.add(name)
    return folded
