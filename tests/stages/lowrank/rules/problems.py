"""Single layers with known inputs, and what a method makes of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcli.families.modules import LowRankLinear
from kdcli.probe.moments import Moments
from kdcli.stages.lowrank import factors
from kdcli.stages.lowrank.factors import Factors, Problem

SHAPES = [(6, 10), (10, 6), (8, 8)]  # (O, I): fewer outputs than inputs, more, and as many


def inputs(count: int, width: int, *, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Anisotropic vectors with a large mean, (N, I); ``rank`` limits the space they span around it."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.03, width)[:, None]
    if rank is not None:
        mixing[rank:] = 0
    return torch.from_numpy(rng.normal(size=(count, width)) @ mixing + 3 * rng.normal(size=width)).float()


def layer_of(shape: tuple[int, int], *, bias: bool = True, seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(shape[1], shape[0], bias=bias)


def moments_of(
    layer: nn.Linear,
    x: torch.Tensor,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> Moments:
    """Moments of the narrow side of a layer, in batches."""
    values = (x @ layer.weight.T if factors.narrow_by_outputs(layer) else x).detach()
    moments = Moments(values.shape[1], values.device, 0 if targets is None else targets.shape[1])
    for at in torch.arange(len(x)).split(37):
        moments.add(
            values[at],
            None if targets is None else targets[at],
            None if weights is None else weights[at],
        )
    return moments


def problem_of(layer: nn.Linear, x: torch.Tensor, **known: Any) -> Problem:
    return factors.problem_of(layer, moments_of(layer, x), **known)


def solved(
    method: ModuleType, layer: nn.Linear, x: torch.Tensor, config: Any = None, **known: Any
) -> Factors:
    config = config or method.Config()
    problem = problem_of(layer, x, centred=config.centred, **known)
    return factors.solve(problem, *method.metrics(problem, config))


def pair_of(layer: nn.Linear, found: Factors, rank: int) -> LowRankLinear:
    pair = LowRankLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
    factors.fill(pair, found, rank)
    return pair


def product(pair: LowRankLinear) -> np.ndarray:
    return (pair.second.weight.double() @ pair.first.weight.double()).detach().numpy()


def error(layer: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Mean over the rows of the squared distance of the outputs."""
    with torch.no_grad():
        return float((layer(x) - other(x)).double().square().sum(1).mean())


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, d, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * d[:rank] @ vt[:rank]
