"""What a method of low-rank factorisation must offer: the contract of ``rules/``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from kdcli.models.conv_factors import Conv, FactorisedConv
from kdcli.registry import MethodSpec
from kdcli.stages.lowrank.factors import Problem

ConvRanks = tuple[int, ...]
"""Of one convolution: what it counts is its method's own."""

LayerStatistic = Literal["sensitivity", "fisher", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class LinearRule(MethodSpec):
    """Factorises matrices: says what an error costs, see :mod:`kdcli.stages.lowrank.factors`.

    Its ``config`` has ``samples`` and ``centred``.
    """

    #: (M, K), both (m, m) float64.
    metrics: Callable[[Problem, Any], tuple[Tensor, Tensor]]
    needs: frozenset[LayerStatistic] = frozenset()  # statistics it reads besides the inputs

    @property
    def weighs_tokens(self) -> bool:
        """Whether it has a setting ``token_power``."""
        return "token_power" in self.settings

    @property
    def fits(self) -> bool:
        """Whether it has settings ``sequential`` and ``ridge``."""
        return "sequential" in self.settings

    @property
    def shares(self) -> bool:
        """Whether it has a setting ``share_right``."""
        return "share_right" in self.settings


@dataclass(frozen=True, kw_only=True)
class ConvolutionRule(MethodSpec):
    """Factorises convolutions from their weights alone."""

    #: ConvRanks at which nothing is lost.
    full: Callable[[Conv], ConvRanks]
    #: ConvRanks from few weights to many, all of them below break-even.
    ladder: Callable[[Conv], list[ConvRanks]]
    by_rank: Callable[[Conv, int], ConvRanks]
    by_energy: Callable[[Conv, float], ConvRanks]
    by_evbmf: Callable[[Conv], ConvRanks]
    decompose: Callable[[Conv, ConvRanks, Any], FactorisedConv]
