"""How many directions each linear layer keeps when all of them share one budget of parameters.

Two shares are known to be reasonable and neither always wins: the even one (every layer keeps the same
fraction) and one that minimises the predicted damage. They, and the mean of the two, are candidates; the
caller tries them on held rows and keeps the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.methods.lowrank.whitening import Spectrum, watching

Ranks = dict[str, int | None]
"""Layer name -> rank, or None where the layer stays dense."""

# No layer is cut below this by predicted damage alone, which is only a local prediction.
_LOWEST = 8


@dataclass(frozen=True)
class Size:
    """Shape of a linear layer (O, I) and the length of its bias (O or 0)."""

    outputs: int
    inputs: int
    bias: int

    @property
    def dense(self) -> int:
        """Parameters of the layer as it is."""
        return self.outputs * self.inputs + self.bias

    @property
    def break_even(self) -> float:
        """The rank O I / (O + I) at which two factors have as many weights as the matrix."""
        return self.outputs * self.inputs / (self.outputs + self.inputs)

    def settle(self, rank: int) -> int | None:
        """The rank, or None (stay dense) at or above break-even."""
        return rank if rank < self.break_even else None

    def parameters(self, rank: int | None) -> int:
        """Parameters at this rank."""
        return self.dense if rank is None else rank * (self.outputs + self.inputs) + self.bias


def size_of(layer: nn.Linear) -> Size:
    """The size of a plain linear layer."""
    return Size(layer.out_features, layer.in_features, 0 if layer.bias is None else layer.out_features)


def total(sizes: Mapping[str, Size], ranks: Ranks) -> int:
    """Parameters of all layers at these ranks."""
    return sum(size.parameters(ranks[name]) for name, size in sizes.items())


def even(sizes: Mapping[str, Size], budget: float) -> Ranks:
    """Give every layer the share ``budget`` of its own parameters, at least rank 1.

    Args:
        sizes: The layers.
        budget: In (0, 1); the bias counts on both sides.

    Raises:
        UsageError: Rank 1 everywhere is already more than the budget.
    """
    ranks: Ranks = {}
    for name, size in sizes.items():
        rank = int((budget * size.dense - size.bias) // (size.outputs + size.inputs))
        ranks[name] = size.settle(max(1, rank))
    dense = sum(s.dense for s in sizes.values())
    if total(sizes, ranks) > budget * dense:
        least = sum(min(s.dense, s.parameters(1)) for s in sizes.values()) / dense
        raise UsageError(
            f"--budget {budget} cannot be met: rank 1 in every layer keeps {least:.2%} of the parameters",
            "give a larger budget, or include larger layers",
        )
    return ranks


def by_damage(sizes: Mapping[str, Size], damage: Mapping[str, np.ndarray], budget: float) -> Ranks:
    """Minimise the summed damage under the budget.

    Every layer takes the rank (or stays dense, without damage) that minimises damage + price * parameters;
    the price is found by bisection, and what is left of the budget then goes rank by rank to where it helps
    most. Up to that rounding this is the optimum among the shares on the lower convex hull.

    Args:
        sizes: The layers.
        damage: Name -> (K + 1,) damage at the ranks 0 ... K, falling.
        budget: In (0, 1), as for :func:`even`.

    Raises:
        UsageError: As for :func:`even`.
    """
    lowest = {n: r if r is None else min(r, _LOWEST) for n, r in even(sizes, budget).items()}
    allowed = budget * sum(s.dense for s in sizes.values())
    choices: dict[str, tuple[list[int | None], np.ndarray, np.ndarray]] = {}
    for name, size in sizes.items():
        low = lowest[name]
        thin = [] if low is None else [r for r in range(low, len(damage[name])) if r < size.break_even]
        options: list[int | None] = [*thin, None]
        cost = np.array([size.parameters(r) for r in options], dtype=np.float64)
        choices[name] = options, cost, np.append(damage[name][thin], 0.0)

    def at(price: float) -> dict[str, int]:
        return {n: int(np.argmin(harm + price * cost)) for n, (_, cost, harm) in choices.items()}

    def spent(picked: Mapping[str, int]) -> float:
        return sum(float(choices[n][1][i]) for n, i in picked.items())

    worst = sum(float(harm[0]) for _, _, harm in choices.values()) or 1.0
    free, dear = -80.0, float(np.log(worst) + 1.0)  # logarithms; one parameter more or less saves < worst
    for _ in range(100):
        middle = (free + dear) / 2
        if spent(at(np.exp(middle))) > allowed:
            free = middle
        else:
            dear = middle
    picked = at(np.exp(dear))
    _spend(choices, picked, allowed - spent(picked))
    return {name: choices[name][0][i] for name, i in picked.items()}


def _spend(
    choices: Mapping[str, tuple[list[int | None], np.ndarray, np.ndarray]],
    picked: dict[str, int],
    left: float,
) -> None:
    """Use up what is left, one step of one layer at a time, largest gain per parameter first."""
    while True:
        best, gain = None, 0.0
        for name, i in picked.items():
            _, cost, harm = choices[name]
            if i + 1 < len(cost) and cost[i + 1] - cost[i] <= left:
                own = float((harm[i] - harm[i + 1]) / (cost[i + 1] - cost[i]))
                if own > gain:
                    best, gain = name, own
        if best is None:
            return
        cost = choices[best][1]
        left -= float(cost[picked[best] + 1] - cost[picked[best]])
        picked[best] += 1


def between(sizes: Mapping[str, Size], one: Ranks, two: Ranks) -> Ranks:
    """The mean of two shares; parameters grow linearly with the rank, so it costs at most their mean."""

    def as_rank(name: str, rank: int | None) -> float:
        return sizes[name].break_even if rank is None else rank

    return {
        name: size.settle(max(1, int((as_rank(name, one[name]) + as_rank(name, two[name])) / 2)))
        for name, size in sizes.items()
    }


def predicted_damage(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    spectra: Mapping[str, Spectrum],
    batches: Iterable[Mapping[str, Tensor]],
    seed: int,
) -> dict[str, np.ndarray]:
    """Predict by how much the divergence KL(model || factorised model) rises with each dropped direction.

    To second order an output error e of a layer costs e^T F e / 2, with F = J^T (diag(p) - p p^T) J the
    Gauss-Newton matrix of the divergence: p the model's probabilities, J the derivative of its logits. F is
    sampled: with e ~ N(0, 1) and v = sqrt(p) * e - p (sqrt(p) . e), the gradient g of v . logits has
    E[g g^T] = F. Labels play no part. A direction u of energy s is then worth s * E[(u . g)^2] / 2, summed
    over the tokens of a row; the energy and the gradient of a token are taken as independent, as in K-FAC.

    Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671, section 3, and Schraudolph 2002 for the Gauss-Newton product.

    Args:
        model: In eval mode, with parameters that require gradients.
        layers: By name.
        spectra: Of the same layers.
        batches: Inputs of the model.
        seed: Of the sampled noise.

    Returns:
        Name -> (K + 1,) nats per row at the ranks 0 ... K, falling to 0.
    """
    noise = torch.Generator().manual_seed(seed)
    squares: dict[str, Tensor] = {}
    rows = 0
    for batch in batches:
        outputs: dict[str, Tensor] = {}

        def see(name: str, _: Tensor, output: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            outputs[name] = output

        with torch.enable_grad(), watching(layers, see):
            logits = model(**batch).logits
        p = logits.detach().softmax(-1)
        sampled = p.sqrt() * torch.randn(p.shape, generator=noise).to(p)
        direction = sampled - p * sampled.sum(-1, keepdim=True)
        gradients = torch.autograd.grad((logits * direction).sum(), list(outputs.values()), allow_unused=True)
        real = batch["attention_mask"].bool()
        rows += len(logits)
        for name, gradient in zip(outputs, gradients, strict=True):
            along = spectra[name].directions
            found = torch.zeros(along.shape[1], dtype=along.dtype, device=along.device)
            if gradient is not None:
                found = (gradient[real].to(along) @ along).square().sum(0)
            squares[name] = squares[name] + found if name in squares else found
    return {
        name: _tail(spectra[name].energies * found.cpu().double().numpy() / (2 * max(1, rows)))
        for name, found in squares.items()
    }


@torch.no_grad()
def divergence(model: nn.Module, dense: Iterable[Tensor], batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean KL(dense || model) over the rows of the batches, in nats; ``dense`` has their logits (B, C)."""
    found = [
        F.kl_div(model(**b).logits.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True).sum(
            -1
        )
        for z, b in zip(dense, batches, strict=True)
    ]
    return float(torch.cat(found).double().mean())


def _tail(values: np.ndarray) -> np.ndarray:
    """(K,) -> (K + 1,): what lies at or beyond every index."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
