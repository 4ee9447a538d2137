r"""Width energy: keep the loudest features of the residual stream, and let them speak for the others.

A transformer's layers read the stream through layer norms $y = \gamma n + \beta$, one for each of $M$ sites: after
the embeddings, and after each sub-layer. The score of feature $i$ of $D$ is its share of the energy at every site
$m$, over the tokens of a sample,

    s_i = \sum_m \frac{\mathrm{E}[(\gamma_{mi}\, n_{mi})^2]}{\sum_j \mathrm{E}[(\gamma_{mj}\, n_{mj})^2]}

and the $D'$ features with the highest scores are kept: a set $S$, the others $O$. With ``refit``, two least-squares
fits on the same tokens of the dense model put right what can be put right without training. A layer norm over $S$
alone has another mean and variance, so each of its features gets the $\gamma$ and $\beta$ that bring it closest to
what it was, with $n'$ normalised over $S$:

    \gamma'_i = \frac{\mathrm{Cov}(n'_i, y_i)}{\mathrm{Var}(n'_i)}
    \qquad \beta'_i = \mathrm{E}[y_i] - \gamma'_i\, \mathrm{E}[n'_i]

and whatever reads $y$ gets what $S$ can tell of $O$, with $C$ the covariance of $y$ and $r$ = ``ridge`` times the
mean of the diagonal of $C_{SS}$:

    R = C_{OS} (C_{SS} + r I)^{-1} \qquad W' = W_S + W_O R \qquad b' = b + W_O (\mathrm{E}[y_O] - R\, \mathrm{E}[y_S])

Sources: the cut is the hidden dimension of Xia, Zhong, Chen 2022, "Structured Pruning Learns Compact and Accurate
Models", arXiv:2204.00408, section 3.1; the energy of normalised activations as a score is that of Muralidharan et
al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679, section 2.2; the refit
of W is the closed form of removing inputs from a least-squares layer, as in Frantar and Alistarh 2022,
arXiv:2208.11580.
Differs: no mask is learned. Sites weigh alike; at the last one only first tokens count, which the head reads.
ELECTRA's projection of the embeddings has no beta and no gamma: the energy of its output counts. The fits are of the
dense model's activations, layer by layer independent of each other; without ``--epochs`` the result is a starting
point, not a model to ship.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.families import stack
from kdcli.families.family import Encoder
from kdcli.families.modules import LowRankLinear, Projection
from kdcli.inputs import kinds
from kdcli.models import transforms
from kdcli.models.transforms import Width
from kdcli.probe import definite
from kdcli.stages.prune.criterion import Criterion, Kept, WidthJob


class Config(BaseModel):
    """Parameters of narrowing the residual stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int | None = Field(
        None, ge=1, description="features that stay; by default from --sparsity or --budget, a multiple of 8"
    )
    refit: bool = Field(True, description="fit layer norms and readers to the dense model's activations")
    ridge: float = Field(1e-4, ge=0, description="of the fit of the readers, relative to the mean variance")
    samples: int = Field(512, ge=1, description="training rows that the energy is estimated on")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the result")


@dataclass
class Site:
    """One place where the stream is written, and what reads it from there."""

    writer: nn.Module  # a layer norm, or ELECTRA's projection of the embeddings
    readers: list[Projection]
    first_token: bool  # the classification head reads the first token alone


class StreamMoments:
    """Sums over tokens of the outer product of [y, 1] with itself, (D + 1, D + 1)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)

    def add(self, y: Tensor) -> None:
        """Take in tokens (N, D)."""
        rows = torch.cat([y.double(), y.new_ones(len(y), 1).double()], 1)
        self.sums += rows.T @ rows

    def mean(self) -> Tensor:
        """(D,)."""
        return self.sums[:-1, -1] / self.sums[-1, -1]

    def covariance(self) -> Tensor:
        """(D, D)."""
        mean = self.mean()
        return self.sums[:-1, :-1] / self.sums[-1, -1] - mean[:, None] * mean


def sites(model: nn.Module, family: Encoder) -> list[Site]:
    """All sites in the order of the forward pass: 1 + 2 L of them."""
    layers = stack.encoder_layers(model, family)
    found = []
    writer = stack.entrance(model, family)
    for layer in layers:
        found.append(Site(writer, [layer.query, layer.key, layer.value] if layer.heads else [], False))
        found.append(Site(layer.attention_norm, [layer.ffn_in] if layer.neurons else [], False))
        writer = layer.ffn_norm
    return [*found, Site(writer, [stack.reader(model, family)], True)]


def regression(covariance: Tensor, mean: Tensor, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Best linear guess of the other features from the kept ones.

    Args:
        covariance: C (D, D).
        mean: (D,).
        kept: S, ascending indices (D',).
        ridge: Relative to the mean variance of the kept ones.

    Returns:
        R (D - D', D') and the offset (D - D',): y_O is about R y_S + offset.
    """
    gone = _others(kept, len(mean))
    inner = covariance[kept][:, kept]
    # At least what rounding makes of constant features: they tell nothing of the others.
    damping = max(ridge, definite.ROUNDING) * definite.scale_of(inner, mean[kept])
    damped = inner + damping * torch.eye(len(kept), dtype=inner.dtype, device=inner.device)
    matrix = definite.solve(damped, covariance[kept][:, gone]).T
    return matrix, mean[gone] - matrix @ mean[kept]


def narrow(job: WidthJob, config: Config) -> Kept:
    """Cut the stream to ``job.keep`` features, in place."""
    model, places = job.model, sites(job.model, job.family)
    width = stack.width_of(model, job.family)
    device = next(model.parameters()).device
    if job.keep >= width:
        return Kept(list(range(width)))
    found = [StreamMoments(width, device) for _ in places]
    with job.progress.task("width", 2 * len(job.batches)) as task:

        def take(number: int, _: Tensor, y: Tensor) -> None:
            found[number].add(y)

        _watch(job, places, take, task.advance)
        scores = torch.zeros(width, dtype=torch.float64, device=device)
        for place, moments in zip(places, found, strict=True):
            energy = moments.sums[:-1, :-1].diagonal() / moments.sums[-1, -1]
            if isinstance(place.writer, nn.LayerNorm):  # of y - beta
                beta = place.writer.bias.detach().double()
                energy = energy - 2 * beta * moments.mean() + beta.square()
            energy = energy.clamp(min=0)
            scores += energy / (float(energy.sum()) or 1.0)
        kept = scores.argsort(descending=True, stable=True)[: job.keep].sort().values
        updates = _refit(job, config, places, found, kept, task.advance) if config.refit else []
    cut = Width(keep=kept.tolist())
    transforms.apply(model, cut)
    with torch.no_grad():
        for module, name, values in updates:  # the modules outlive the cut, their parameters do not
            getattr(module, name).copy_(values)
    return Kept(cut.keep, detail={"energy_kept": float(scores[kept].sum() / (float(scores.sum()) or 1.0))})


def _refit(
    job: WidthJob,
    config: Config,
    places: list[Site],
    found: list[StreamMoments],
    kept: Tensor,
    advance: Callable[[], None],
) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and new values of parameters of the narrowed model."""
    device = kept.device
    # Sums over tokens of n', y, n'^2 and n' y, features of S only.
    sums = [torch.zeros(4, len(kept), dtype=torch.float64, device=device) for _ in places]
    tokens = [0] * len(places)

    def take(number: int, x: Tensor, y: Tensor) -> None:
        place = places[number]
        if isinstance(place.writer, nn.LayerNorm):
            n = torch.nn.functional.layer_norm(x[:, kept].double(), (len(kept),), eps=place.writer.eps)
            target = y[:, kept].double()
            sums[number] += torch.stack([n.sum(0), target.sum(0), (n * n).sum(0), (n * target).sum(0)])
            tokens[number] += len(n)

    _watch(job, places, take, advance)
    updates: list[tuple[nn.Module, str, Tensor]] = []
    for place, moments, total, count in zip(places, found, sums, tokens, strict=True):
        if isinstance(place.writer, nn.LayerNorm):
            n, y, squares, products = total / count
            variance = squares - n * n
            # A feature that does not vary tells nothing of its scale: it keeps its own.
            own = place.writer.weight.detach().double()[kept]
            varies = variance > definite.ROUNDING * squares
            gamma = torch.where(varies, (products - n * y) / variance, own)
            updates += [(place.writer, "weight", gamma), (place.writer, "bias", y - gamma * n)]
        matrix, offset = regression(moments.covariance(), moments.mean(), kept, config.ridge)
        gone = _others(kept, len(moments.sums) - 1)
        for reader in place.readers:
            first = reader.first if isinstance(reader, LowRankLinear) else reader
            weight = first.weight.detach().double()
            updates.append((first, "weight", weight[:, kept] + weight[:, gone] @ matrix))
            if reader.bias is not None:
                shift = weight[:, gone] @ offset
                if isinstance(reader, LowRankLinear):
                    shift = reader.second.weight.detach().double() @ shift
                holder = reader.second if isinstance(reader, LowRankLinear) else reader
                updates.append((holder, "bias", reader.bias.detach().double() + shift))
    return updates


def _watch(
    job: WidthJob,
    places: list[Site],
    take: Callable[[int, Tensor, Tensor], None],
    advance: Callable[[], None],
) -> None:
    """Run the sample and show ``take`` the inputs and outputs (N, D) of every writer at real tokens."""
    with torch.no_grad():
        for inputs, _ in job.batches:
            mask = kinds.mask(inputs).bool()
            with _hooks(places, mask, take):
                job.model(**inputs)
            advance()


@contextmanager
def _hooks(places: list[Site], mask: Tensor, take: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The head reads the first token, which is real in every row.
            at = (slice(None), 0) if places[number].first_token else mask
            take(number, args[0][at], output[at])

        return seen

    handles = [place.writer.register_forward_hook(hook(i)) for i, place in enumerate(places)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _others(kept: Tensor, width: int) -> Tensor:
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()


METHOD = Criterion(config=Config, narrow=narrow)
