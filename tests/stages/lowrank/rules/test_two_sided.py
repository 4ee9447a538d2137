"""Two-sided whitening against the dense closed form, and the divergence that it predicts."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.stages.lowrank import curvature, factors
from kdcli.stages.lowrank.rules import two_sided, whitening
from tests.stages.lowrank.rules import problems
from tests.stages.lowrank.rules.problems import SHAPES

EXACT = two_sided.Config(floor=1e-9)


def felt(outputs: int, seed: int = 0) -> np.ndarray:
    """A Gauss-Newton matrix of uneven size, (O, O)."""
    g = np.random.default_rng(seed).normal(size=(5 * outputs, outputs)) * np.geomspace(1, 0.05, outputs)
    return g.T @ g / len(g)


def known(layer: nn.Linear, g: np.ndarray) -> torch.Tensor:
    """P^T G P."""
    weight = layer.weight.detach().double()
    left = torch.eye(len(g), dtype=torch.float64) if layer.out_features < layer.in_features else weight
    return left.T @ torch.from_numpy(g) @ left


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form(shape: tuple[int, int]) -> None:
    layer, x, g = problems.layer_of(shape), problems.inputs(500, shape[1]), felt(shape[0])
    found = problems.solved(two_sided, layer, x, EXACT, sensitivity=known(layer, g))
    weight, data = layer.weight.detach().double().numpy(), x.double().numpy()
    root = np.linalg.cholesky(np.cov(data.T, bias=True))
    half = np.linalg.cholesky(g).T  # half^T half = G
    d = np.linalg.svd(half @ weight @ root, compute_uv=False)
    np.testing.assert_allclose(found.energies, d**2, rtol=1e-3, atol=1e-5 * d[0] ** 2)
    for rank in range(1, min(shape)):
        best = np.linalg.inv(half) @ problems.truncated(half @ weight @ root, rank) @ np.linalg.inv(root)
        wrong = half @ (weight - problems.product(problems.pair_of(layer, found, rank))) @ root
        least = half @ (weight - best) @ root
        # The objective, not the matrix: where nothing is felt the matrix is free.
        assert (wrong**2).sum() == pytest.approx((least**2).sum(), rel=1e-3)
        assert found.damage[rank] == pytest.approx((least**2).sum() / 2, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_are_felt_alike_give_whitening(shape: tuple[int, int]) -> None:
    layer, x = problems.layer_of(shape), problems.inputs(200, shape[1])
    same = known(layer, 3 * np.eye(shape[0]))
    ours = problems.pair_of(layer, problems.solved(two_sided, layer, x, EXACT, sensitivity=same), 3)
    plain = problems.pair_of(layer, problems.solved(whitening, layer, x), 3)
    np.testing.assert_allclose(problems.product(ours), problems.product(plain), atol=1e-4)
    nothing = torch.zeros_like(same)
    blind = problems.pair_of(layer, problems.solved(two_sided, layer, x, sensitivity=nothing), 3)
    np.testing.assert_allclose(problems.product(blind), problems.product(plain), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_changes_nothing_even_where_nothing_is_felt(shape: tuple[int, int]) -> None:
    layer, x, g = problems.layer_of(shape), problems.inputs(200, shape[1], rank=3), felt(shape[0])
    g[2:] = 0
    g[:, 2:] = 0
    found = problems.solved(two_sided, layer, x, sensitivity=known(layer, g))
    pair = problems.pair_of(layer, found, min(shape))
    elsewhere = torch.randn(50, shape[1])
    torch.testing.assert_close(pair(elsewhere), layer(elsewhere), rtol=0, atol=1e-4)


class Classifier(nn.Module):
    """Logits are a linear map of the first token's outputs, so that the Gauss-Newton matrix is known."""

    def __init__(self, shape: tuple[int, int], states: torch.Tensor) -> None:
        super().__init__()
        self.states = states  # (V, I), of every token
        self.fc = problems.layer_of(shape)
        torch.manual_seed(4)
        self.head = nn.Linear(shape[0], 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.fc(self.states[input_ids])[:, 0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sampled_sensitivity_is_the_second_order_divergence(shape: tuple[int, int]) -> None:
    model = Classifier(shape, torch.randn(2, shape[1]))
    row = torch.arange(2)[None]
    batch = {"input_ids": row.repeat(20000, 1), "attention_mask": torch.ones(20000, 2, dtype=torch.long)}
    found = curvature.sensitivity(model, {"fc": model.fc}, [batch], 0)
    p = model(row, None).logits[0].softmax(-1).detach().double().numpy()
    jacobian = model.head.weight.detach().double().numpy()
    expected = known(model.fc, jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian).numpy()
    # Sampling noise of second moments: sqrt(2 / 20000) = 1% of the largest, six of them.
    np.testing.assert_allclose(found.matrices["fc"], expected, atol=0.06 * np.abs(expected).max())
    assert not found.tokens[0]["fc"][:, 1].any()  # the second token has no influence
    assert (found.tokens[0]["fc"][:, 0] > 0).all()
    again = curvature.sensitivity(model, {"fc": model.fc}, [batch], 0)
    assert torch.equal(found.matrices["fc"], again.matrices["fc"])
    assert model.fc.weight.grad is None


@pytest.mark.parametrize("tokens", [3, 9])
def test_a_table_is_felt_by_its_outputs_also_with_fewer_tokens_than_features(tokens: int) -> None:
    shape = (tokens, 5)
    model = Classifier((5, 5), torch.empty(0))
    table = nn.Embedding(*shape)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=model.head(table(input_ids)[:, 0]))

    whole = nn.Module()
    whole.table, whole.forward = table, forward  # type: ignore[assignment]
    batch = {
        "input_ids": torch.ones(20000, 2, dtype=torch.long),
        "attention_mask": torch.ones(20000, 2, dtype=torch.long),
    }
    found = curvature.sensitivity(whole, {"table": table}, [batch], 0).matrices["table"]
    p = (
        forward(batch["input_ids"][:1], batch["attention_mask"])
        .logits[0]
        .softmax(-1)
        .detach()
        .double()
        .numpy()
    )
    jacobian = model.head.weight.detach().double().numpy()
    expected = jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    # Sampling noise as above.
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


def test_the_model_diverges_less_than_with_whitening() -> None:
    x = problems.inputs(400, 8)
    model = Classifier((8, 8), x)
    layer = model.fc
    batch = {"input_ids": torch.arange(400)[:, None], "attention_mask": torch.ones(400, 1, dtype=torch.long)}
    with torch.no_grad():
        model.head.weight *= 0.3  # near the dense model, where second order is enough
    dense = model(**batch).logits.log_softmax(-1).detach()
    sampled = curvature.sensitivity(model, {"fc": layer}, [batch] * 20, 0).matrices["fc"]
    divergences, predicted = [], []
    for found in (
        problems.solved(two_sided, layer, x, sensitivity=sampled),
        problems.solved(whitening, layer, x, sensitivity=sampled),
    ):
        model.fc = problems.pair_of(layer, found, 2)  # type: ignore[assignment]
        now = model(**batch).logits.log_softmax(-1).detach()
        divergences.append(float(nn.functional.kl_div(now, dense, reduction="batchmean", log_target=True)))
        predicted.append(float(found.damage[2]))
    assert divergences[0] < 0.7 * divergences[1]
    assert predicted[0] < 0.7 * predicted[1]
    # To an order: rows and their sensitivity are not independent here.
    assert predicted[0] == pytest.approx(divergences[0], rel=0.5)


def placed(source: torch.Tensor, offset: int) -> torch.Tensor:
    """The same matrix, ``offset`` bytes behind where PyTorch would put it."""
    room = torch.empty(source.numel() + offset // source.element_size(), dtype=source.dtype)
    return room[-source.numel() :].view(source.shape).copy_(source)


@pytest.mark.parametrize("dependent", [False, True])
def test_a_refit_solves_for_the_sensitivity_and_does_not_depend_on_where_matrices_lie(
    dependent: bool,
) -> None:
    """The same bits at 16 places; the solution is compared with NumPy's pseudo-inverse."""
    layer, x = problems.layer_of((128, 128)), problems.inputs(400, 128)
    if dependent:  # two equal input features
        with torch.no_grad():
            layer.weight[:, 1] = layer.weight[:, 0]
    now = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std(0)
    moments = problems.moments_of(layer, now, layer(x).detach())
    g = felt(128)
    made = problems.problem_of(layer, x, sensitivity=known(layer, g))
    found = []
    for offset in range(0, 4096, 256):
        moved = dataclasses.replace(made, left=placed(made.left, offset))
        found.append(factors.refit(moved, moments, ridge=0.3))
    for other in found[1:]:
        assert other.sensitivity is not None
        assert torch.equal(other.sensitivity, found[0].sensitivity)
    weight, target = made.left.numpy(), found[0].left.numpy()
    solution = np.linalg.pinv(weight, rcond=1e-8) @ target
    expected = solution.T @ made.sensitivity.numpy() @ solution
    # Normal equations lose as many digits as the square of the condition number, here some 1e6.
    np.testing.assert_allclose(found[0].sensitivity.numpy(), expected, atol=1e-6 * np.abs(expected).max())
