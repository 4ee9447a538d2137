"""From the output z of a model to the number that its owner reads, and the likelihood that goes with it.

===========  ==============  =================================  ==============================
name         the number m    loss against y                     KL of two models' answers
===========  ==============  =================================  ==============================
identity     z               (z - y)^2 / 2                      (z_after - z_before)^2 / 2
sigmoid      1/(1 + e^-z)    -y log m - (1 - y) log(1 - m)      of two Bernoulli distributions
===========  ==============  =================================  ==============================

Both are canonical links (McCullagh and Nelder 1989, section 2.2.4): the gradient of either loss is m - y.
The second is what a cross-encoder of sentence-transformers has and trains with; its labels are in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import InputError
from kdcli.tasks import CROSS_ENCODER

_OLD_KEY = "sbert_ce_default_activation_function"  # before sentence-transformers 4
_PIPELINE_KEY = "function_to_apply"  # read by transformers' pipeline
_APPLIED = {"none": "identity"}


class Link(ABC):
    """One way of reading an output. Shape letter: B rows; tensors are (B,)."""

    name: str
    path: str  # of the module, as CrossEncoder imports it

    @abstractmethod
    def number(self, z: np.ndarray) -> np.ndarray:
        """Outputs, any shape, to numbers, float64."""

    @abstractmethod
    def inverse(self, m: np.ndarray) -> np.ndarray:
        """Numbers, float32 and of any shape, to finite outputs."""

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """Outputs to numbers."""

    @abstractmethod
    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """The negative log likelihood of y, less what does not depend on z where there is no bound below."""

    @abstractmethod
    def divergence(self, after: Tensor, before: Tensor) -> Tensor:
        """KL(before || after), 0 where they are equal."""

    @abstractmethod
    def drawn(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """One draw from the distribution a row; the generator is on the CPU."""

    def noise(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Draws less their mean."""
        return self.drawn(z, generator) - self.mean(z)

    @abstractmethod
    def combined(self, every: Tensor, weights: Tensor) -> Tensor:
        """(M, B, 1) outputs of M models with weights (M,) of sum 1: the output whose number is their mean."""

    @abstractmethod
    def check(self, labels: np.ndarray) -> None:
        """Refuse labels that cannot be learnt; NaN where there is none.

        Raises:
            InputError: They are no values of the number.
        """


class Identity(Link):
    """The output is the number, the mean of a Gaussian of variance 1."""

    name, path = "identity", "torch.nn.modules.linear.Identity"

    def number(self, z: np.ndarray) -> np.ndarray:
        return z.astype(np.float64)

    def inverse(self, m: np.ndarray) -> np.ndarray:
        return m

    def mean(self, z: Tensor) -> Tensor:
        return z

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square() / 2

    def divergence(self, after: Tensor, before: Tensor) -> Tensor:
        return (after - before).square() / 2

    def drawn(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return z + self.noise(z, generator)

    def noise(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(len(z), generator=generator).to(z)

    def combined(self, every: Tensor, weights: Tensor) -> Tensor:
        return (every * weights[:, None, None]).sum(0)

    def check(self, labels: np.ndarray) -> None:
        return None


class Sigmoid(Link):
    """The output is the logit of the number, the mean of a Bernoulli distribution."""

    name, path = "sigmoid", "torch.nn.modules.activation.Sigmoid"

    def number(self, z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64)
        small = np.exp(-np.abs(z))
        found: np.ndarray = np.where(z >= 0, 1.0, small) / (1.0 + small)
        return found

    def inverse(self, m: np.ndarray) -> np.ndarray:
        tiny, most = np.finfo(np.float32).tiny, np.nextafter(np.float32(1), np.float32(0))
        m = np.clip(m, tiny, most).astype(np.float64)
        found: np.ndarray = (np.log(m) - np.log1p(-m)).astype(np.float32)
        return found

    def mean(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, y, reduction="none")

    def divergence(self, after: Tensor, before: Tensor) -> Tensor:
        up, down = F.logsigmoid(before), F.logsigmoid(-before)
        return up.exp() * (up - F.logsigmoid(after)) + down.exp() * (down - F.logsigmoid(-after))

    def drawn(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(z.float().cpu().sigmoid(), generator=generator).to(z)

    def combined(self, every: Tensor, weights: Tensor) -> Tensor:
        # Of both sides in logarithms: a mean near 1 has no accurate complement.
        log = weights.log()[:, None, None]
        up = (F.logsigmoid(every) + log).logsumexp(0)
        return up - (F.logsigmoid(-every) + log).logsumexp(0)

    def check(self, labels: np.ndarray) -> None:
        known = labels[~np.isnan(labels)]
        if len(known) and (known.min() < 0 or known.max() > 1):
            raise InputError(
                f"the model's number is a sigmoid, between 0 and 1, but the labels go from {known.min():g} to "
                f"{known.max():g}: it cannot learn them",
                "divide the labels by their largest value, or start from a model without an activation",
            )


IDENTITY, SIGMOID = Identity(), Sigmoid()
LINKS: Mapping[str, Link] = {one.name: one for one in (IDENTITY, SIGMOID)}


def of_config(config: Mapping[str, Any], where: str = "config.json") -> Link:
    """The link of a model with one output, by the rules of ``CrossEncoder`` and of transformers' pipeline.

    ``sentence_transformers.activation_fn`` counts first, then the older key, then ``function_to_apply``. A directory
    that ``CrossEncoder`` wrote without an activation has a sigmoid, as it has there; any other the identity.

    Args:
        config: config.json.
        where: What messages call it.

    Raises:
        InputError: The activation is another one.
    """
    own = config.get(CROSS_ENCODER)
    stated: Sequence[Any] = (
        own.get("activation_fn") if isinstance(own, Mapping) else None,
        config.get(_OLD_KEY),
        config.get(_PIPELINE_KEY),
    )
    said = next((one for one in stated if one is not None), None)
    if said is None:
        return SIGMOID if isinstance(own, Mapping) else IDENTITY
    last = str(said).rpartition(".")[2].casefold()
    link = LINKS.get(_APPLIED.get(last, last))
    if link is None:
        raise InputError(
            f"{where} puts {str(said)[:60]!r} on the model's output; kdcli knows {', '.join(LINKS)}",
            f"if the output itself is the number, say {IDENTITY.path} there",
        )
    return link
