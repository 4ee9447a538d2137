"""How much a model's answers feel a change of a layer's outputs or weights: second derivatives by sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcli.inputs import kinds
from kdcli.probe.hooks import watching
from kdcli.stages.lowrank.factors import narrow_by_outputs, narrow_size
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

# A backward pass through 12 layers of 768 keeps some 0.8 MB a token.
TOKENS = 256
"""Tokens of a batch that are differentiated together, at most, if a row is not longer."""


@dataclass(frozen=True)
class OutputSensitivity:
    """``matrices``: layer -> P^T G P (m, m) in nats a row. ``tokens``: of every batch, layer -> |g|^2 (B, T)."""

    matrices: dict[str, Tensor]
    tokens: list[dict[str, Tensor]]


def sensitivity(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Embedding],
    batches: Iterable[Mapping[str, Tensor]],
    seed: int,
    task: Task = CLASSIFICATION,
) -> OutputSensitivity:
    """Sample the Gauss-Newton matrix G of the divergence of the changed model's answers for every layer's outputs.

    To second order an output error e of a layer costs e^T G e / 2, with G = E[J^T H J] summed over the tokens of a
    row: J the derivative of the model's logits, H the task's curvature, which is diag(p) - p p^T for classes of
    probabilities p. With E[v v^T] = H, the gradient g of v . logits has E[g g^T] = G, so one backward pass gives a
    sample for every token. Labels play no part. Tokens are taken as independent and
    errors as independent of gradients, as in K-FAC.

    The squared gradients of the tokens say which of them an error matters at: in the last layer of a model
    that classifies by its first token all others are 0.

    Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671, section 3, and Schraudolph 2002 for the Gauss-Newton product.

    Args:
        model: In eval mode.
        layers: By name.
        batches: Inputs of the model; padding does not count.
        seed: Of the sampled noise.
        task: What an answer is.
    """
    noise = torch.Generator().manual_seed(seed)
    matrices: dict[str, Tensor] = {}
    tokens: list[dict[str, Tensor]] = []
    rows = 0
    for whole in batches:
        parts: list[dict[str, Tensor]] = []
        for batch in _parts(whole):
            outputs, logits = _watched(model, layers, batch)
            direction = task.curved(logits, noise)
            gradients = torch.autograd.grad(
                (logits * direction).sum(), list(outputs.values()), allow_unused=True
            )
            real = kinds.mask(batch).bool()
            rows += len(logits)
            parts.append({})
            for name, gradient in zip(outputs, gradients, strict=True):
                layer = layers[name]
                size = narrow_size(layer)
                if name not in matrices:
                    matrices[name] = torch.zeros(size, size, device=logits.device)
                if gradient is None:
                    parts[-1][name] = torch.zeros_like(real, dtype=logits.dtype)
                    continue
                parts[-1][name] = gradient.square().sum(-1) * real
                narrow = gradient[real]
                if not narrow_by_outputs(layer):
                    narrow = narrow @ layer.weight.detach()  # an embedding is narrow by its outputs
                matrices[name].addmm_(narrow.T, narrow)
        tokens.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return OutputSensitivity(
        {name: matrix / max(1, rows) for name, matrix in matrices.items()},
        tokens,
    )


def fisher(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Embedding],
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    task: Task = CLASSIFICATION,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over the rows and over the columns of every layer's empirical Fisher information.

    The Fisher information of a weight is the mean over the rows of the data of the squared gradient of a
    row's loss. The gradient of one row's weight is sum_t g_t x_t^T, so the sum over a weight row i is
    sum_(t, s) g_ti (x_t . x_s) g_si, and over a column j the same with g and x exchanged: no gradient matrix
    is ever made.

    Args:
        model: In eval mode.
        layers: By name.
        batches: Inputs, and labels of B rows.
        task: Whose loss is differentiated.

    Returns:
        Name -> float64 sums (O,) and (I,), divided by the number of rows.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    rows = 0
    for batch, targets in _labelled(batches):
        inputs: dict[str, Tensor] = {}
        outputs, logits = _watched(model, layers, batch, inputs)
        loss = task.loss(logits, targets, "sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
        real = kinds.mask(batch).unsqueeze(-1)
        rows += len(logits)
        for name, gradient in zip(outputs, gradients, strict=True):
            g = torch.zeros_like(outputs[name]) if gradient is None else gradient * real
            if isinstance(layers[name], nn.Embedding):
                sums = _of_table(g, inputs[name], len(layers[name].weight))
            else:
                x = inputs[name].detach() * real
                sums = (_weighed(g, x @ x.transpose(1, 2)), _weighed(x, g @ g.transpose(1, 2)))
            old = found.get(name)
            found[name] = sums if old is None else (old[0] + sums[0], old[1] + sums[1])
    return {name: (a / max(1, rows), b / max(1, rows)) for name, (a, b) in found.items()}


def _weighed(one: Tensor, alike: Tensor) -> Tensor:
    """(D,) float64: sum over rows of sum_(t, s) one_td alike_ts one_sd, of (B, T, D) and (B, T, T)."""
    return ((alike @ one) * one).sum((0, 1)).double()


def _of_table(g: Tensor, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The same for a table: its inputs are one-hot, so two tokens are alike where their ids are."""
    alike = (ids[:, :, None] == ids[:, None, :]).to(g)
    by_token = ((alike @ g) * g).sum(-1).double()
    columns = torch.zeros(tokens, dtype=torch.float64, device=g.device)
    return _weighed(g, alike), columns.index_add(0, ids.flatten(), by_token.flatten())


def _parts(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batch (B, T) in parts of whole rows with about :data:`TOKENS` tokens."""
    rows, length = kinds.shape(batch)
    step = max(1, TOKENS // length)
    for at in range(0, rows, step):
        yield {key: value[at : at + step] for key, value in batch.items()}


def _labelled(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    for batch, targets in batches:
        at = 0
        for part in _parts(batch):
            count = kinds.size(part)
            yield part, targets[at : at + count]
            at += count


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient, so nothing is kept for them."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


def _watched(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Embedding],
    batch: Mapping[str, Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    outputs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        outputs[name] = y if y.requires_grad else y.requires_grad_()  # what comes first starts the graph
        if inputs is not None:
            inputs[name] = x

    with torch.enable_grad(), _frozen(model), watching(layers, see):
        return outputs, model(**batch).logits
