"""Fisher-weighted SVD against the paper's formula in NumPy, on both sides of the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.stages.lowrank import curvature
from kdcli.stages.lowrank.rules import fwsvd, svd
from tests.stages.lowrank.rules import problems
from tests.stages.lowrank.rules.problems import SHAPES


def sums(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.exponential(size=n) ** 3) for n in shape)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ["outputs", "inputs"])
def test_the_papers_formula(shape: tuple[int, int], rows: str) -> None:
    layer, x, fisher = problems.layer_of(shape), problems.inputs(100, shape[1]), sums(shape)
    found = problems.solved(fwsvd, layer, x, fwsvd.Config(rows=rows), fisher=fisher)
    weight = layer.weight.detach().double().numpy()
    for rank in range(1, min(shape) + 1):
        if rows == "outputs":  # I W by rows, I = sqrt(F)
            scale = np.sqrt(fisher[0].numpy())[:, None]
            expected = problems.truncated(scale * weight, rank) / scale
        else:
            scale = np.sqrt(fisher[1].numpy())[None]
            expected = problems.truncated(weight * scale, rank) / scale
        pair = problems.pair_of(layer, found, rank)
        # The floor of 1e-7 under the metric, with weights of up to 1e3 times their mean apart.
        np.testing.assert_allclose(problems.product(pair), expected, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_importance_is_plain_svd(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(100, shape[1])
    same = tuple(torch.full((n,), 7.0, dtype=torch.float64) for n in shape)
    plain = problems.pair_of(layer, problems.solved(svd, layer, x), 3)
    for rows in ("outputs", "inputs"):
        weighed = problems.solved(fwsvd, layer, x, fwsvd.Config(rows=rows), fisher=same)
        np.testing.assert_allclose(
            problems.product(problems.pair_of(layer, weighed, 3)), problems.product(plain), atol=1e-5
        )


def test_the_weighted_objective_is_lower_than_that_of_plain_svd() -> None:
    layer, x, fisher = problems.layer_of((10, 8)), problems.inputs(100, 8), sums((10, 8))
    weight = layer.weight.detach().numpy()
    for rows, weights in (("outputs", fisher[0].numpy()[:, None]), ("inputs", fisher[1].numpy()[None])):
        losses = []
        for found in (
            problems.solved(fwsvd, layer, x, fwsvd.Config(rows=rows), fisher=fisher),
            problems.solved(svd, layer, x),
        ):
            wrong = weight - problems.product(problems.pair_of(layer, found, 3))
            losses.append(float((weights * wrong**2).sum()))
        assert losses[0] < 0.8 * losses[1]


def test_no_importance_anywhere_and_rows_without_any() -> None:
    layer, x = problems.layer_of((6, 10)), problems.inputs(50, 10)
    none = (torch.zeros(6), torch.zeros(10))
    found = problems.solved(fwsvd, layer, x, fisher=none)
    plain = problems.solved(svd, layer, x)
    np.testing.assert_allclose(found.energies, plain.energies, rtol=1e-5)
    some = (torch.tensor([1.0, 0, 1, 0, 1, 0]), torch.ones(10))
    pair = problems.pair_of(layer, problems.solved(fwsvd, layer, x, fisher=some), 3)
    kept = [0, 2, 4]  # three rows matter and three directions are enough for them
    torch.testing.assert_close(pair(x)[:, kept], layer(x)[:, kept], rtol=0, atol=1e-2)


class Model(nn.Module):
    """Two layers over tokens, logits from the first token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 5)
        self.one = nn.Linear(5, 6)
        self.two = nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        hidden = torch.tanh(self.one(self.table(input_ids))) * attention_mask[..., None]
        mixed = hidden[:, 0] + hidden.sum(1)
        return type("Output", (), {"logits": self.two(mixed[:, None])[:, 0]})


def test_fisher_sums_are_those_of_gradients_taken_row_by_row() -> None:
    model = Model()
    ids = torch.tensor([[1, 2, 3], [4, 2, 0], [2, 2, 6]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    targets = torch.tensor([0, 2, 1])
    layers = {"table": model.table, "one": model.one}
    batch = {"input_ids": ids, "attention_mask": mask}
    found = curvature.fisher(model, layers, [(batch, targets)])
    squares = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}
    for at in range(3):
        width = int(mask[at].sum())
        one = {"input_ids": ids[at : at + 1, :width], "attention_mask": mask[at : at + 1, :width]}
        loss = nn.functional.cross_entropy(model(**one).logits, targets[at : at + 1])
        for name, layer in layers.items():
            squares[name] += torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].double() ** 2 / 3
    torch.testing.assert_close(found["one"][0], squares["one"].sum(1), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["one"][1], squares["one"].sum(0), rtol=1e-5, atol=1e-9)
    # A table is the transposed matrix of one-hot inputs: its rows are the tokens.
    torch.testing.assert_close(found["table"][0], squares["table"].sum(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["table"][1], squares["table"].sum(1), rtol=1e-5, atol=1e-9)
