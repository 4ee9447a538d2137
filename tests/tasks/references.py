"""What tests of tasks compare with: naive resamples and curvature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kdcli.tasks.task import Task

DRAWS = 400
"""Of the naive bootstrap: its standard error is known to 1 / sqrt(2 * 400) = 3.5%."""


def spread(metric: Callable[[np.ndarray], float], rows: int) -> float:
    """Standard deviation of a metric of row numbers over plain resamples."""
    generator = np.random.default_rng(1)
    return float(np.std([metric(generator.integers(0, rows, rows)) for _ in range(DRAWS)]))


def jackknife(metric: Callable[[np.ndarray], float], rows: int) -> np.ndarray:
    """(N,) what a metric of row numbers loses without each row."""
    every = np.arange(rows)
    return np.array([metric(every) - metric(np.delete(every, row)) for row in range(rows)])


def curvature(task: Task, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, C) Hessian of the divergence at equality, by autograd, and the mean of v v^T over many draws of one row."""
    exact = torch.autograd.functional.hessian(
        lambda after: task.divergence(after[None], logits[None])[0], logits, vectorize=True
    )
    assert isinstance(exact, torch.Tensor)
    v = task.curved(logits.expand(200_000, -1), torch.Generator().manual_seed(0))
    return exact, v.T @ v / len(v)
