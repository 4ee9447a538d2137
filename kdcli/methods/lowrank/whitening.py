"""Whitened, centred truncated SVD: the factor pair whose outputs differ least on calibration tokens.

For a layer y = W x + b and calibration inputs of mean mu and covariance C = S S^T, the rank-r matrix that
minimises the mean squared output error

    E |(W - W') (x - mu)|^2 = |(W - W') S|_F^2 = sum of the squared singular values of W S beyond the r-th

is W' = U_r U_r^T W, with U_r the first r left singular vectors of W S. The mean is moved into the bias,
b' = b + (W - W') mu, so it costs no rank.

Source: Chen et al. 2021, "DRONE: Data-aware Low-rank Compression for Large NLP Models", NeurIPS 2021, and
Wang et al. 2024, "SVD-LLM", arXiv:2403.07378, section 3 (truncation-aware whitening).
Differs: both whiten with a factor of C and multiply by its inverse afterwards, which needs a repair where C
is singular (after GELU it often is). U_r needs neither: it holds the leading eigenvectors of W C W^T, the
covariance of the layer's outputs, so a singular C is no special case and nothing is inverted. Inputs are
centred, padding is left out, and the square roots of the singular values are shared by the two factors as
in SVD-LLM, so that what flows between them has an even scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.models import transforms
from kdcli.models.layers import LowRankLinear

# Share of W W^T beside W C W^T: of directions that no calibration token uses, the largest of W come first.
_TIE = 1e-7


class Config(BaseModel):
    """Parameters of whitened factorisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(1024, ge=8, description="calibration rows, drawn from the training rows by the seed")


class Moments:
    """Count, mean (D,) and covariance (D, D) of vectors that arrive in batches, summed in float64.

    Batches are centred before their product is taken and joined by the update of Chan, Golub and LeVeque
    1979, "Updating formulae and a pairwise algorithm for computing sample variances": subtracting the mean
    at the end would lose the small directions next to a large mean, which layer norms produce.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=place)
        self._scatter = torch.zeros(size, size, dtype=torch.float64, device=place)

    def add(self, vectors: Tensor) -> None:
        """Take in (N, D) vectors."""
        count = len(vectors)
        if not count:
            return
        vectors = vectors.detach().float()
        mean = vectors.mean(0)
        centred = vectors - mean
        shift = mean.to(self.mean) - self.mean
        total = self.count + count
        self._scatter += (centred.T @ centred).to(self._scatter)
        self._scatter += torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by the count."""
        return self._scatter / max(1, self.count)


@dataclass(frozen=True)
class Spectrum:
    """A layer's outputs, split into orthogonal directions of falling energy.

    ``directions`` (O, K) are the left singular vectors of W S, ``energies`` (K,) its squared singular values
    in units of the squared output, per token; K = min(O, I). ``centre`` (O,) is W mu.
    """

    directions: Tensor
    energies: np.ndarray
    centre: Tensor

    def error(self, rank: int) -> float:
        """Relative squared output error at this rank: the dropped energy by all of it."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total else 0.0

    def rank(self, energy: float) -> int:
        """The lowest rank that keeps this share of the energy."""
        kept = np.cumsum(self.energies)
        return min(len(kept), int(np.searchsorted(kept, energy * kept[-1])) + 1)


@contextmanager
def watching(layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input, output)`` whenever one of the layers runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: see(name, inputs[0], output)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Mapping[str, Tensor]],
    moments: dict[str, Moments],
) -> list[Tensor]:
    """Run the batches and add every layer's statistics to ``moments``.

    Layers that read the very same tensor (query, key and value) share one :class:`Moments`. A layer with
    fewer outputs than inputs is described by its outputs, any other by its inputs: either gives W C W^T, and
    this is the smaller matrix.

    Args:
        model: In eval mode.
        layers: By name, as in ``moments``.
        batches: Inputs of the model; tokens whose ``attention_mask`` (B, T) is 0 do not count.
        moments: Extended in place; start with an empty one.

    Returns:
        The logits (B, C) of every batch.
    """
    logits = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        # The tensors are kept until the batch is over, so that no identity is used twice.
        added: dict[int, tuple[Tensor, Moments]] = {}

        def see(name: str, x: Tensor, y: Tensor, real: Tensor = real, added: dict = added) -> None:
            values = y if _by_outputs(layers[name]) else x
            if id(values) not in added:
                own = moments.get(name) or Moments(values.shape[-1], values.device)
                own.add(values[real])
                added[id(values)] = (values, own)
            moments[name] = added[id(values)][1]

        with watching(layers, see):
            logits.append(model(**batch).logits)
    return logits


def _by_outputs(layer: nn.Linear) -> bool:
    return layer.out_features < layer.in_features


@torch.no_grad()
def decompose(layer: nn.Linear, moments: Moments) -> Spectrum:
    """Solve the whitened problem of one layer for all ranks at once, in float64.

    Args:
        layer: With weight (O, I).
        moments: Of its inputs (I,), or of its outputs (O,) when O < I; see :func:`collect`.
    """
    place = moments.mean.device
    weight = layer.weight.detach().to(place, torch.float64)
    bias = 0.0 if layer.bias is None else layer.bias.detach().to(place, torch.float64)
    covariance = moments.covariance
    basis: Tensor | None = None
    reduced = weight
    if _by_outputs(layer):
        centre = moments.mean - bias
        energy = covariance
    else:
        centre = weight @ moments.mean
        if layer.out_features > layer.in_features:
            # W = Q R: the eigenvectors of W C W^T are Q times those of the small R C R^T.
            basis, reduced = torch.linalg.qr(weight)
        energy = reduced @ covariance @ reduced.T
    if layer.bias is None:  # nowhere to put the mean: it has to be approximated like everything else
        inner = centre if basis is None else basis.T @ centre
        energy = energy + torch.outer(inner, inner)
    plain = reduced @ reduced.T
    scale = float(energy.trace()) / max(float(plain.trace()), torch.finfo(torch.float64).tiny)
    vectors = torch.linalg.eigh(energy + _TIE * (scale or 1.0) * plain).eigenvectors.flip(1)
    energies = (vectors * (energy @ vectors)).sum(0)
    directions = vectors if basis is None else basis @ vectors
    return Spectrum(
        directions=directions.to(torch.float32),  # the weights they end up in are float32 too
        energies=energies.clamp(min=0).cpu().numpy(),
        centre=centre,
    )


@torch.no_grad()
def install(model: nn.Module, name: str, spectrum: Spectrum, rank: int) -> LowRankLinear:
    """Replace the linear layer ``name`` by its best factor pair of this rank.

    Returns:
        The pair: first (R, I), second (O, R), bias (O,).
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    kept = spectrum.directions[:, :rank].double()
    largest = max(float(spectrum.energies[0]), 1e-12)
    # Square roots of singular values; a direction without energy gets a small factor and not zero.
    balance = (
        torch.from_numpy(np.maximum(spectrum.energies[:rank] / largest, 1e-8) * largest).to(kept) ** 0.25
    )
    first = kept.T @ layer.weight.detach().to(kept) / balance[:, None]
    pair = transforms.factorise(model, name, rank)
    pair.first.weight.copy_(first)
    pair.second.weight.copy_(kept * balance)
    if pair.bias is not None:
        assert layer.bias is not None
        pair.bias.copy_(layer.bias.detach().to(kept) + spectrum.centre - kept @ (kept.T @ spectrum.centre))
    return pair


@torch.no_grad()
def errors(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    pairs: Mapping[str, nn.Module],
    spectra: Mapping[str, Spectrum],
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Measure E |pair(x) - layer(x)|^2 / E |layer(x) - mean|^2 on the layers' inputs in the dense model.

    Args:
        model: With ``layers`` in place, in eval mode.
        layers: The dense layers by name.
        pairs: What would replace some of them.
        spectra: Of the layers; their centres give the mean output.
        batches: Inputs of the model; padding does not count.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in pairs}
    real = torch.empty(0)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        outputs, bias = y[real], layers[name].bias
        mean = 0.0 if bias is None else bias + spectra[name].centre.to(y)
        wrong, spread = pairs[name](x[real]) - outputs, outputs - mean
        sums[name] += torch.stack([wrong.square().sum(), spread.square().sum()]).cpu()

    with watching({name: layers[name] for name in pairs}, see):
        for batch in batches:
            real = batch["attention_mask"].bool()
            model(**batch)
    return {name: float(wrong / spread) if spread else 0.0 for name, (wrong, spread) in sums.items()}
