r"""Layer KL: drop, one by one, the layer without which the answers change least.

With $p(x)$ the classes' probabilities of the dense model for row $x$ and $p_S(x)$ those of the model whose layers are
$S$,

    \mathrm{KL}(S) = \underset{x}{\text{mean}} \sum_c p_c(x) \bigl( \log p_c(x) - \log p_{S,c}(x) \bigr)

and each step drops the layer $l$ with the least $\mathrm{KL}(S \setminus l) / \text{price}_l$, $S$ being what the
steps before have left. Of $L$ layers, $k$ steps take $k L - k (k - 1) / 2$ passes over the sample, each shorter
than the last. It needs no labels.

Sources: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks", arXiv:2402.09025, the third metric of its section on redundancy verification: every block of the model as it
is by then is judged again. Sajjad et al. 2023, arXiv:2004.03844: dropping layers of BERT.
Differs: SLEB takes the likelihood of the next token; here it is the divergence between two classifiers. The price
matters only for a model whose layers are uneven.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.families import stack
from kdcli.families.family import Encoder
from kdcli.inputs.feeding import Labelled
from kdcli.stages.prune.criterion import Criterion, Kept, LayerJob
from kdcli.tasks.task import Task


class Config(BaseModel):
    """Parameters of dropping layers by KL."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    keep_layers: int | None = Field(
        None, ge=1, description="layers that stay; by default from --sparsity or --budget"
    )
    samples: int = Field(512, ge=1, description="training rows that the divergence is estimated on")
    batch_size: int = Field(32, ge=1, description="rows per batch; changes speed and memory, not the result")


def answers(model: nn.Module, batches: Iterable[Labelled]) -> Tensor:
    """Logits (N, C) of all rows, float64."""
    with torch.no_grad():
        return torch.cat([model(**inputs).logits.double() for inputs, _ in batches])


def divergence(task: Task, dense: Tensor, other: Tensor) -> float:
    """Mean divergence of logits (N, C) from the dense ones of the same rows; in nats where it is a KL."""
    return float(task.divergence(other, dense).mean())


def without(model: nn.Module, family: Encoder, kept: Sequence[int], batches: Iterable[Labelled]) -> Tensor:
    """Logits (N, C) of ``model`` with the given layers alone; the model is as before afterwards."""
    whole = model.get_submodule(family.layers)
    stack.keep_layers(model, family, kept)
    try:
        return answers(model, batches)
    finally:
        model.set_submodule(family.layers, whole)


def choose(job: LayerJob, config: Config) -> Kept:
    """Drop layers greedily until those gone cost ``job.remove``; one stays.

    The trace has, for every step, the layer that went and the KL without each candidate.
    """
    dense = answers(job.model, job.batches)
    kept, trace, gone = list(range(len(job.prices))), [], 0.0
    layers, steps = len(kept), int(np.ceil(job.remove / job.prices.mean()))
    with job.progress.task("layers", steps * layers - steps * (steps - 1) // 2) as task:
        while gone < job.remove * (1 - 1e-9) and len(kept) > 1:
            found = {}
            for layer in kept:
                rest = [i for i in kept if i != layer]
                found[layer] = divergence(job.task, dense, without(job.model, job.family, rest, job.batches))
                task.advance()
            worth = {i: kl / job.prices[i] if job.prices[i] > 0 else np.inf for i, kl in found.items()}
            least = min(kept, key=lambda i: (worth[i], found[i]))
            kept.remove(least)
            gone += float(job.prices[least])
            trace.append({"dropped": least, "kl": found[least], "candidates": found})
    return Kept(kept, trace)


METHOD = Criterion(config=Config, choose=choose)
