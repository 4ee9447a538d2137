"""What ``--dry-run`` can say of a stage before a weight is loaded: how long it takes, in what memory, on what disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli.tasks.task import Task

# Floating-point operations a second, for an order of magnitude only. Measured with MiniLM in float32 on two
# AVX-512 cores: 1.1e11 in training, 9e10 at inference; training is halved for machines without AVX-512.
TRAINING, RUNNING = 5e10, 8e10
STATISTICS_ROWS = 1024
"""Training rows that a stage looks at to decide what to remove, about."""


@dataclass(frozen=True)
class Sizes:
    """A model and its data from outside."""

    config: Mapping[str, Any]  # of the model
    rows: Mapping[str, int]  # split -> rows
    tokens: float  # of a row
    task: Task
    labels: int  # outputs of a head for them
    weights: int  # bytes
    cost: float  # floating-point operations of one forward pass of a row

    def learning(self, rows: float, cost: float | None = None) -> float:
        """Seconds for one pass of training over so many rows, with gradients."""
        return rows * 3 * (self.cost if cost is None else cost) / TRAINING


@dataclass
class Foreseen:
    """What a stage says of itself."""

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # besides measuring the model before and after
    memory: int = 0  # bytes, besides the model that came in
    written: int | None = None  # bytes; None for about as many as the model that came in has


def flops_a_row(layers: int, hidden: int, tokens: float) -> float:
    """Floating-point operations of one forward pass: 12 d^2 weights a layer, and the attention products."""
    return 2 * layers * (12 * hidden**2 * tokens + 2 * hidden * tokens**2)
