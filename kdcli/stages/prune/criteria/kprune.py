r"""Prune from the first sub-layer to the last by what each unit knows, refitting every output matrix on the way.

For every sub-layer in its order the knowledge of all units that are left from there on is measured in the model as it
is now. For head or neuron $u$ with gate $m_u$, features $h_u$ and columns $W_u$ of its output projection, with means
over rows and over tokens and answers $y$ drawn from $\mathrm{softmax}(z_\text{dense} / T)$:

    P_u = \tfrac12\, \text{mean} \left( T^2\, \frac{\partial\, \mathrm{CE}(y, z / T)}{\partial m_u} \right)^2 \qquad
    R_u = \text{mean}\; \lVert W_u h_u \rVert^2 \\
    K_u = P_u + w_\text{representational}\, R_u

$P$ is the predictive knowledge, $R$ the representational. To second order $P$ is $T^2$ times the rise of
$T^2\, \mathrm{KL}(\text{dense}_T \Vert \text{without } u)$, both with answers softened by $T$: a factor that all
units share. The units with the most knowledge $K$ per cost are kept under what is left of the budget; only those of
the sub-layer at hand are cut, and its output matrix is refitted by least squares to the dense model's outputs. No
labels are used.

Source: Park, Choi, Kang 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models",
arXiv:2308.03449, section 3.2 (knowledge, eq. 4 to 8), 3.3 (mask search) and 3.4 (weight tuning).
Differs: the gradients are of single rows with drawn answers, whose squares have the Hessian of the KL as their mean;
the paper takes the gradient of the KL itself, which is zero as long as the model is dense. Heads have no factor of
their own. The head of the classifier is refitted too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.inputs import kinds
from kdcli.inputs.feeding import Labelled
from kdcli.probe.layer_stream import PARTS, Pair
from kdcli.stages.prune import head_refit, sublayer_refit
from kdcli.stages.prune.budget import choose, cut_of
from kdcli.stages.prune.criteria.taylor import gated, gradients
from kdcli.stages.prune.criterion import Criterion, UnitJob, Units, UnitsCut, some_rows


class Config(BaseModel):
    """Parameters of K-prune."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(2048, ge=1, description="training rows whose activations are fitted")
    scored: int = Field(256, ge=1, description="of these rows, those on which knowledge is measured")
    batch_size: int = Field(256, ge=1, description="rows per batch; changes speed and memory only")
    temperature: float = Field(2.0, gt=0, description="softens the answers whose knowledge is measured")
    representational: float = Field(2.5e-4, ge=0, description="weight of the representational knowledge")
    ridge: float = Field(
        1e-3, gt=0, description="pull towards the dense weights, a share of the mean variance"
    )
    refit_head: bool = Field(True, description="fit the linear layers of the head as well")


def prune(job: UnitJob, config: Config) -> UnitsCut:
    """Cut and refit one sub-layer after the other; the budget is shared out anew before each."""
    start = job.price(job.layers)
    family = job.layers[0].family
    if job.remove <= 0:
        return UnitsCut(cut_of([[np.arange(len(x)) for x in p] for p in (start.heads, start.neurons)], start))
    scored = some_rows(job.batches, config.scored)
    drawn = _draw(job, scored, config.temperature)
    pair = Pair(job.model, family, job.layers, job.batches)
    head = head_refit.Head(job.model, family, job.batches) if config.refit_head else None
    kept = [[np.arange(len(x)) for x in some] for some in (start.heads, start.neurons)]
    budget = float(start.only(job.structure).flat().sum()) - job.remove
    steps: list[dict[str, Any]] = []
    with job.progress.task("cut and refit", len(job.layers)) as task:
        for layer in job.layers:
            pair.enter(layer.index)
            for part in PARTS:
                units = layer.heads if part == "heads" else layer.neurons
                if not units:
                    continue
                stay = list(range(units))
                if part in job.structure.split("+"):
                    scores = knowledge(job, scored, drawn, config)
                    stay = _chosen(job, scores, layer.index, part, budget)
                if len(stay) < units or steps:
                    moments = pair.moments(layer.index, part)
                    error = sublayer_refit.cut(layer, part, stay, moments, config.ridge)
                    removed = units - len(stay)
                    steps.append({"layer": layer.index, "part": part, "removed": removed, "error": error})
                side = kept[PARTS.index(part)]
                side[layer.index] = side[layer.index][stay]
            pair.leave(layer.index)
            task.advance()
    if head is not None:
        head.refit(pair.pruned, config.ridge)
    return UnitsCut(cut_of(kept, start), steps)


def knowledge(job: UnitJob, batches: Sequence[Labelled], drawn: Sequence[Tensor], config: Config) -> Units:
    """Knowledge K of every unit that the model has now.

    Args:
        job: The model and its layers.
        batches: Rows to measure on.
        drawn: Answers (B,) of every batch, drawn from the dense model's.
        config: Temperature, and the weight of the representational part.
    """
    layers, t = job.layers, config.temperature
    total = Units([np.zeros(x.heads) for x in layers], [np.zeros(x.neurons) for x in layers])
    energy = _Energy(job)
    rows = 0
    for (inputs, _), answers in zip(batches, drawn, strict=True):
        with torch.enable_grad(), gated(layers, len(answers)) as gates, energy.of(kinds.mask(inputs)):
            logits = job.model(**inputs).logits.float()
            loss = t * t * job.task.loss(logits / t, answers, "sum")
            found = gradients(loss, gates)
        for sums, grads in ((total.heads, found.heads), (total.neurons, found.neurons)):
            for at, grad in zip(sums, grads, strict=True):
                at += 0.5 * grad.square().sum(0).cpu().double().numpy()
        rows += len(answers)
    power = energy.mean()
    pairs = ((total.heads, power.heads), (total.neurons, power.neurons))
    merged = [
        [p / rows + config.representational * r for p, r in zip(own, theirs, strict=True)]
        for own, theirs in pairs
    ]
    return Units(merged[0], merged[1])


class _Energy:
    """Sums up || W_u h_u ||^2 over real tokens for every unit while the model runs."""

    def __init__(self, job: UnitJob) -> None:
        self.layers = job.layers
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._tokens = 0.0

    @contextmanager
    def of(self, mask: Tensor) -> Iterator[None]:
        """Watch one batch with the real tokens ``mask`` (B, T)."""
        hooks = []
        real = mask.bool()
        self._tokens += float(real.sum())
        for layer in self.layers:
            for part, units in (("heads", layer.heads), ("neurons", layer.neurons)):
                if units:
                    projection = layer.attention_output if part == "heads" else layer.ffn_out
                    hooks.append(
                        projection.register_forward_pre_hook(self._watch(layer.index, part, units, real))
                    )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, index: int, part: str, units: int, real: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            h = args[0].detach()[real].float().unflatten(-1, (units, -1))  # (N, units, width)
            found = torch.einsum("nui,nuj->uij", h, h).cpu().double()
            key = (index, part)
            self._sums[key] = self._sums[key] + found if key in self._sums else found

        return hook

    def mean(self) -> Units:
        """Energy per token of every unit."""
        found = Units([], [])
        for layer in self.layers:
            for part, into in (("heads", found.heads), ("neurons", found.neurons)):
                second = self._sums.get((layer.index, part))
                if second is None:
                    into.append(np.zeros(0))
                    continue
                weight, _ = sublayer_refit.matrix(layer, part)
                own = weight.unflatten(1, (len(second), -1))  # (D, units, width)
                into.append((torch.einsum("dui,uij,duj->u", own, second, own) / self._tokens).numpy())
        return found


@torch.no_grad()
def _draw(job: UnitJob, batches: Sequence[Labelled], temperature: float) -> list[Tensor]:
    """One answer a row, drawn from the model's softened ones."""
    generator = torch.Generator().manual_seed(job.seed)
    drawn = []
    for inputs, _ in batches:
        drawn.append(job.task.drawn(job.model(**inputs).logits.float() / temperature, generator))
    return drawn


def _chosen(job: UnitJob, scores: Units, index: int, part: str, budget: float) -> list[int]:
    """Units of one sub-layer that stay when all from there on share what the ones before have left of the budget."""
    price = job.price(job.layers)
    first = PARTS.index(part)
    open_ = [
        [n > index or (n == index and side >= first) for n in range(len(job.layers))] for side in range(2)
    ]
    spent = 0.0
    parts = []
    for side, (own, cost) in enumerate(((scores.heads, price.heads), (scores.neurons, price.neurons))):
        free = PARTS[side] in job.structure.split("+")
        spent += sum(float(c.sum()) for c, o in zip(cost, open_[side], strict=True) if free and not o)
        parts.append(
            (
                [x if o and free else x[:0] for x, o in zip(own, open_[side], strict=True)],
                [x if o and free else x[:0] for x, o in zip(cost, open_[side], strict=True)],
            )
        )
    chosen = choose(Units(parts[0][0], parts[1][0]), Units(parts[0][1], parts[1][1]), budget - spent)
    return np.flatnonzero((chosen.heads if part == "heads" else chosen.neurons)[index]).tolist()


METHOD = Criterion(config=Config, prune=prune)
