"""Wanda against naive numpy, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.stages.prune.criteria import magnitude, wanda
from kdcli.stages.prune.criterion import Pattern
from tests import tiny
from tests.stages.prune.criteria.jobs import padded, singly, weight_job


def naive(weight: np.ndarray, tokens: np.ndarray, lose: int) -> np.ndarray:
    """Row by row, weight by weight."""
    kept = np.ones(weight.shape, dtype=bool)
    for i, row in enumerate(weight):
        score = [abs(w) * np.linalg.norm(tokens[:, j]) for j, w in enumerate(row)]
        kept[i, sorted(range(len(score)), key=score.__getitem__)[:lose]] = False
    return kept


def first_inputs(made, batch) -> np.ndarray:
    """What query, key and value of the first layer read, real tokens only (N, I)."""
    with torch.no_grad():
        hidden = made.model.bert.embeddings(input_ids=batch["input_ids"])
    return hidden[batch["attention_mask"].bool()].double().numpy()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_the_first_layer_is_pruned_as_numpy_would(sparsity: float) -> None:
    made, dense = tiny.checkpoint(), tiny.checkpoint()
    tokens = first_inputs(made, tiny.batch())
    found = wanda.zero(weight_job(made, Pattern(sparsity)), wanda.Config())
    for name in list(found)[:3]:
        weight = dense.model.get_parameter(f"{name}.weight").detach().double().numpy()
        assert np.array_equal(found[name].numpy(), naive(weight, tokens, round(sparsity * 32)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_row_loses_the_same_number_and_no_weight_moves(family: str) -> None:
    made, dense = tiny.checkpoint(family), tiny.checkpoint(family)
    job = weight_job(made, Pattern(0.3))
    found = wanda.zero(job, wanda.Config())
    assert found.keys() == job.matrices.keys()
    for name, kept in found.items():
        assert ((~kept).sum(1) == round(0.3 * kept.shape[1])).all()
        before = dense.model.get_parameter(f"{name}.weight")
        assert torch.equal(job.matrices[name].weight, before.masked_fill(~kept, 0.0))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
def test_n_of_m_in_every_block(n: int, m: int) -> None:
    for kept in wanda.zero(weight_job(tiny.checkpoint(), Pattern(1 - n / m, n, m)), wanda.Config()).values():
        whole = kept.shape[1] // m * m
        assert (kept[:, :whole].unflatten(1, (-1, m)).sum(-1) == n).all()
        assert kept[:, whole:].all()


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4)])
def test_padding_and_batches_change_nothing(pattern: Pattern) -> None:
    batch = tiny.batch()
    found = []
    for batches in (None, singly(batch), padded(batch, 9, tiny.checkpoint().pad_id)):
        found.append(wanda.zero(weight_job(tiny.checkpoint(), pattern, batches), wanda.Config()))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_inputs_of_equal_size_make_it_magnitude_in_every_row() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wanda.scores(weight, torch.full((16,), 4.0, dtype=torch.float64)), 2 * weight.abs())


def test_a_small_weight_on_a_large_input_stays() -> None:
    weight, squares = torch.tensor([[0.1, 1.0]]), torch.tensor([400.0, 1.0], dtype=torch.float64)
    assert wanda.scores(weight, squares).tolist() == [[pytest.approx(2.0), pytest.approx(1.0)]]
    assert magnitude.masks({"w": weight}, Pattern(0.5), magnitude.Config())["w"].tolist() == [[False, True]]


def test_the_layer_gives_more_of_its_output_than_by_magnitude() -> None:
    """Inputs differ in size a hundredfold, as hidden features of trained encoders do."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 64, generator=generator) * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64, generator=generator)
    errors = []
    for scores in (wanda.scores(weight, tokens.square().mean(0).double()), weight.abs()):
        kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, 32:], True)
        errors.append(float((tokens @ (weight * ~kept).T).square().mean()))
    assert errors[0] < 0.5 * errors[1]
