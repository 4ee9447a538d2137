"""What is factorised as one, and how its factors take the place of its layers.

A :class:`FactorUnit` is a linear layer, the query, key and value layers of one attention when they share a
right factor, or an embedding table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdcli.families.modules import LowRankLinear
from kdcli.models import transforms
from kdcli.stages.lowrank import factors
from kdcli.stages.lowrank.factors import Factors


@dataclass(frozen=True)
class FactorUnit:
    """What is factorised as one: its name, the names of its layers, and the dense layer (stacked by outputs)."""

    name: str
    members: tuple[str, ...]
    dense: nn.Linear | nn.Embedding

    @property
    def table(self) -> bool:
        """Whether it is an embedding table."""
        return isinstance(self.dense, nn.Embedding)


@torch.no_grad()
def unit_of(model: nn.Module, members: Sequence[str]) -> FactorUnit:
    """Make a unit of one layer, or of several with the same inputs and with biases."""
    layers = [model.get_submodule(name) for name in members]
    if len(layers) == 1:
        assert isinstance(layers[0], nn.Linear | nn.Embedding)
        return FactorUnit(members[0], tuple(members), layers[0])
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    stacked = nn.Linear(linears[0].in_features, sum(x.out_features for x in linears), device="meta")
    stacked.weight = nn.Parameter(torch.cat([x.weight for x in linears]))
    stacked.bias = nn.Parameter(torch.cat([x.bias for x in linears]))
    return FactorUnit(members[0], tuple(members), stacked)


@torch.no_grad()
def install(model: nn.Module, unit: FactorUnit, found: Factors, rank: int) -> None:
    """Put the factors of ``rank`` in the place of the unit's layers."""
    if unit.table:
        table = transforms.factorise_table(model, unit.name, rank)
        left, right = found.left[:, :rank], found.right[:rank]
        table.token_embeddings.weight.copy_(right.T)
        table.second.weight.copy_(left)
        table.second.bias.copy_(found.centre - left.double() @ found.mean[:rank])
        return
    pairs = transforms.factorise_linears(model, unit.members, rank)
    assert isinstance(unit.dense, nn.Linear)
    inputs, outputs = unit.dense.in_features, unit.dense.out_features
    whole = LowRankLinear(inputs, outputs, rank, bias=unit.dense.bias is not None)
    whole.to(unit.dense.weight.device)
    factors.fill(whole, found, rank)
    pairs[0].first.weight.copy_(whole.first.weight)
    at = 0
    for pair in pairs:
        pair.second.weight.copy_(whole.second.weight[at : at + pair.out_features])
        if pair.second.bias is not None:
            pair.second.bias.copy_(whole.second.bias[at : at + pair.out_features])
        at += pair.out_features


def restore(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Put modules back under their names."""
    for name, module in dense.items():
        model.set_submodule(name, module)
