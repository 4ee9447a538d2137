"""Layers that surgery leaves behind, and how to slice any of them.

Shape letters used by the whole package: B batch, T tokens, C classes, O output features,
I input features, R rank, H heads, F feed-forward neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = second(first(x))``: a linear layer of rank at most R, stored as its two factors.

    Args:
        in_features: I.
        out_features: O.
        rank: R, at least 1.
        bias: Whether the layer it replaces had a bias; it sits on the second factor.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def out_features(self) -> int:
        return self.second.out_features

    @property
    def rank(self) -> int:
        return self.first.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return self.second(self.first(x))


class LowRankEmbedding(nn.Module):
    """``y = second(table[id])``: a table of V tokens of D features, stored as V tokens of R and one map to D.

    Source: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
    ICLR 2020, arXiv:1909.11942, section 3.1 (factorised embedding parameterisation).
    Differs: the map has a bias, so that the mean of the tokens costs no rank.

    Args:
        tokens: V.
        features: D.
        rank: R, at least 1.
        padding_idx: As of ``nn.Embedding``; decides gradients alone.
    """

    def __init__(self, tokens: int, features: int, rank: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(tokens, rank, padding_idx=padding_idx)
        self.second = nn.Linear(rank, features)

    @property
    def num_embeddings(self) -> int:
        return self.token_embeddings.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.second.out_features

    @property
    def padding_idx(self) -> int | None:
        return self.token_embeddings.padding_idx

    @property
    def rank(self) -> int:
        return self.token_embeddings.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The table (V, D) that the factors stand for."""
        return self.second(self.token_embeddings.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...) integers to (..., D)."""
        return self.second(self.token_embeddings(ids))


class SmoothLinear(nn.Linear):
    """``y = W (x * m) + b``: a linear layer whose input is multiplied by a vector first.

    Where the input also goes elsewhere (a residual, as in models with the layer norm behind it), the factor
    cannot move into the layer before it. ``m`` is the buffer ``smooth``, (I,). In floats the order does not
    matter, so the weight is multiplied here, which leaves the graph of the model as it was; in integers the
    input is.
    """

    smooth: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("smooth", torch.ones(in_features))

    @classmethod
    def of(cls, layer: nn.Linear) -> SmoothLinear:
        """A layer that shares the parameters of ``layer`` and multiplies by ones."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        made.smooth = torch.ones(layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return F.linear(x, self.weight * self.smooth, self.bias)


class BiasOnly(nn.Module):
    """What is left of an output projection whose inputs are all gone: its bias, for every token.

    A layer of zero input features would do the same in torch, but ONNX runtimes treat empty
    matrix products differently, so the product is not written at all.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, anything) to (B, T, O)."""
        return self.bias.expand(*x.shape[:-1], -1)


class FirstFeature(nn.Module):
    """Stands where the input projection of an emptied sub-layer was; only the shape of its result is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, I) to (B, T, 1)."""
        return x[..., :1]


class EmptyAttention(nn.Module):
    """An attention module without heads.

    Args:
        output_name: Attribute under which the family keeps the output projection inside the attention
            module (DistilBERT, MPNet), so that its bias keeps its name in the checkpoint; None when the
            projection lives elsewhere (BERT, RoBERTa, ELECTRA).
        output: The bias that is left of that projection.
    """

    def __init__(self, output_name: str | None = None, output: BiasOnly | None = None) -> None:
        super().__init__()
        self.output_name = output_name
        if output_name is not None and output is not None:
            setattr(self, output_name, output)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Map (B, T, I) to the bias (B, T, O), or to a placeholder (B, T, 1) for the projection outside."""
        if self.output_name is not None:
            return getattr(self, self.output_name)(hidden_states), None
        return hidden_states[..., :1], None


Projection = nn.Linear | LowRankLinear


def projections(module: nn.Module) -> dict[str, nn.Linear]:
    """Return every plain linear layer below ``module`` by its dotted name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def keep_outputs(layer: Projection | BiasOnly, index: Sequence[int]) -> None:
    """Keep only the given output features of ``layer``, in place and in the given order."""
    if isinstance(layer, BiasOnly):
        layer.bias = _picked(layer.bias, index)
        return
    target = layer.second if isinstance(layer, LowRankLinear) else layer
    target.weight = _picked(target.weight, index)
    if target.bias is not None:
        target.bias = _picked(target.bias, index)
    target.out_features = len(index)


def keep_inputs(layer: Projection, index: Sequence[int]) -> None:
    """Keep only the given input features of ``layer``, in place and in the given order."""
    target = layer.first if isinstance(layer, LowRankLinear) else layer
    target.weight = _picked(target.weight, index, 1)
    target.in_features = len(index)


def keep_normalised(norm: nn.LayerNorm, index: Sequence[int]) -> None:
    """Keep only the given features of ``norm``; its mean and variance are over those alone from now on."""
    norm.weight = _picked(norm.weight, index)
    norm.bias = _picked(norm.bias, index)
    norm.normalized_shape = (len(index),)


def keep_columns(table: nn.Embedding, index: Sequence[int]) -> None:
    """Keep only the given features of an embedding table, in place."""
    table.weight = _picked(table.weight, index, 1)
    table.embedding_dim = len(index)


def keep_rows(table: nn.Embedding, index: Sequence[int]) -> None:
    """Keep only the given rows of an embedding table, in place; the padding row keeps its role."""
    padding = table.padding_idx
    table.weight = _picked(table.weight, index)
    table.num_embeddings = len(index)
    if padding is not None:
        table.padding_idx = list(index).index(padding) if padding in index else None


def _picked(tensor: Tensor, index: Sequence[int], dim: int = 0) -> nn.Parameter:
    at = torch.as_tensor(index, dtype=torch.long, device=tensor.device)
    return nn.Parameter(tensor.detach().index_select(dim, at), requires_grad=tensor.requires_grad)
