r"""Taylor importance: what the loss says about switching off a head or a neuron, from one gradient.

Every unit $u$ gets a gate $c_u$, equal to 1, that multiplies its output $x$: a head's part of the input of the
attention output projection (B, T, H E), a neuron's entry of the input of the second feed-forward
layer (B, T, F). For one row with loss $L$, to first order, summed over tokens and features,

    L(c_u = 0) - L(c_u = 1) \approx -\frac{\partial L}{\partial c_u} = -\sum x\, \frac{\partial L}{\partial x}

and the importance of a unit is, over the rows of the sample,

    \text{absolute: } \sum_n \left| \frac{\partial L_n}{\partial c_u} \right| \qquad
    \text{squared: } \sum_n \left( \frac{\partial L_n}{\partial c_u} \right)^2

Sources: Molchanov et al. 2017, arXiv:1611.06440, eq. 7 (absolute, features of CNNs); Michel, Levy, Neubig
2019, arXiv:1905.10650, eq. 2 (absolute, heads); Kwon et al. 2022, arXiv:2204.09656, section 4.1 (squared:
the diagonal of the empirical Fisher information of the gates; times 1/2 it is the expected loss increase,
a constant that changes no ranking).
Differs: gradients are of single rows. Kwon's code squares the gradient of a batch mean, in which rows of
opposite sign cancel. Michel divides by the norm of each layer's scores; here heads and neurons of all
layers compete for one budget, for which their scores must stay in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.families.layer import Layer
from kdcli.inputs.feeding import Labelled
from kdcli.stages.prune.budget import search
from kdcli.stages.prune.criterion import Criterion, UnitJob, Units, UnitsCut
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

Score = Literal["absolute", "squared"]


class Config(BaseModel):
    """Parameters of Taylor pruning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=1, description="training rows that the importance is estimated on")
    steps: int = Field(8, ge=1, description="estimates of the iterative schedule, each followed by a cut")
    score: Score = Field("squared", description="what is summed over the rows: |gradient| or its square")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the scores")


@dataclass(frozen=True)
class Gates:
    """Leaf tensors of ones, one row of gates for every row of the batch: L of (B, H) and L of (B, F)."""

    heads: list[Tensor]
    neurons: list[Tensor]


@contextmanager
def gated(layers: Sequence[Layer], rows: int) -> Iterator[Gates]:
    """Multiply every head's and neuron's output by a gate for as long as the context lasts.

    The gates have a row for each row of the batch, so that one backward pass of the summed loss gives the
    gradient of every row by itself.

    Args:
        layers: Encoder layers; parts of them without units are left alone.
        rows: B of the batches that will run.
    """
    hooks = []
    gates = Gates([], [])
    try:
        for layer in layers:
            device = next(layer.module.parameters()).device
            heads = torch.ones(rows, layer.heads, device=device, requires_grad=True)
            neurons = torch.ones(rows, layer.neurons, device=device, requires_grad=True)
            gates.heads.append(heads)
            gates.neurons.append(neurons)
            if layer.heads:
                hook = _multiply(heads, layer.head_size)
                hooks.append(layer.attention_output.register_forward_pre_hook(hook))
            if layer.neurons:
                hooks.append(layer.ffn_out.register_forward_pre_hook(_multiply(neurons, 1)))
        yield gates
    finally:
        for hook_ in hooks:
            hook_.remove()


def gradients(loss: Tensor, gates: Gates) -> Gates:
    """Derivative of a loss summed over rows with respect to every gate, in the shapes of the gates."""
    flat = torch.autograd.grad(
        loss, [*gates.heads, *gates.neurons], allow_unused=True, materialize_grads=True
    )
    return Gates(list(flat[: len(gates.heads)]), list(flat[len(gates.heads) :]))


def reduce_rows(gradient: Tensor, score: Score) -> Tensor:
    """Sum |g| or g^2 over the rows: (B, U) -> (U,)."""
    return (gradient.abs() if score == "absolute" else gradient.square()).sum(0)


def importance(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Labelled],
    score: Score,
    task: Task = CLASSIFICATION,
) -> tuple[Units, float]:
    """Taylor importance of every head and neuron.

    The model is used as it stands: in eval mode its rows do not depend on each other, which the gradients
    of single rows rest on. Its weights are frozen meanwhile and get back whether they wanted gradients.

    Args:
        model: A classifier in eval mode, with ``logits`` (B, C) in its output.
        layers: Its encoder layers.
        batches: At least one.
        score: What to sum over the rows.
        task: Whose loss is differentiated.

    Returns:
        The scores as float64, and the mean loss of the rows in nats.
    """
    total = Units([np.zeros(x.heads) for x in layers], [np.zeros(x.neurons) for x in layers])
    loss_sum, rows = 0.0, 0
    for loss, found in row_gradients(model, layers, batches, task):
        for sums, grads in ((total.heads, found.heads), (total.neurons, found.neurons)):
            for at, grad in zip(sums, grads, strict=True):
                at += reduce_rows(grad, score).cpu().numpy()
        loss_sum, rows = loss_sum + loss, rows + len(found.heads[0])
    return total, loss_sum / rows


def row_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Labelled],
    task: Task = CLASSIFICATION,
) -> Iterator[tuple[float, Gates]]:
    """For every batch, its rows' summed loss and the gradient of each row's loss with respect to its gates.

    The weights are frozen until the last batch, or until the iterator is closed.
    """
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for inputs, labels in batches:
            with torch.enable_grad(), gated(layers, len(labels)) as gates:
                loss = task.loss(model(**inputs).logits.float(), labels, "sum")
                found = gradients(loss, gates)
            yield float(loss.detach()), found
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def prune(job: UnitJob, config: Config) -> UnitsCut:
    """Cut by Taylor importance, estimated again after every part of the cut where the schedule says so."""
    steps = config.steps if job.iterative else 1
    with job.progress.task("importance", steps * len(job.batches)) as task:

        def counted() -> Iterator[Labelled]:
            for batch in job.batches:
                yield batch
                task.advance()

        return search(
            job, lambda: importance(job.model, job.layers, counted(), config.score, job.task), steps
        )


def _multiply(gate: Tensor, width: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook: scale each run of ``width`` features of (B, T, U * width) by its gate of (B, U)."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (x.unflatten(-1, (-1, width)).mul(gate[:, None, :, None]).flatten(-2), *args[1:])

    return hook


METHOD = Criterion(config=Config, prune=prune)
