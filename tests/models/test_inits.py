from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdcli.models import inits
from kdcli.models.inits import row_norm, svd_projection, token_table, token_vectors
from tests import tiny

DIGITS = 1e-10  # double precision on numbers of order one; sums of 40 terms lose two digits of sixteen


def table(rows: int = 40, width: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixed


@pytest.mark.parametrize("width", [1, 5, 12])
def test_projection_spans_the_leading_singular_vectors(width: int) -> None:
    given = table()
    found = svd_projection(given, width).numpy()
    assert np.allclose(found.T @ found, np.eye(width), atol=DIGITS)
    _, values, vectors = np.linalg.svd(given.numpy(), full_matrices=False)
    expected = vectors[:width].T
    # A singular vector is known up to its sign.
    assert np.allclose(np.abs((found * expected).sum(0)), 1, atol=DIGITS)
    left = given.numpy() - given.numpy() @ found @ found.T
    assert np.linalg.norm(left) == pytest.approx(np.sqrt((values[width:] ** 2).sum()), abs=1e-8)


def test_projection_has_a_fixed_sign() -> None:
    found = svd_projection(table(), 5)
    assert torch.allclose(svd_projection(-table().flip(0), 5), found, atol=1e-9)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_token_table_is_the_principal_components_at_the_length_asked_for() -> None:
    given = (table() + 3).float()
    found = token_table(given, 4, norm=0.7)
    assert found.shape == (40, 4)
    assert found.dtype == torch.float32
    assert row_norm(found) == pytest.approx(0.7, rel=1e-6)
    assert found.mean(0).abs().max() < 1e-6
    # Distances between tokens are those of the best rank-4 approximation, all times one factor.
    centred = given.double().numpy() - given.double().numpy().mean(0)
    u, values, _ = np.linalg.svd(centred, full_matrices=False)
    reference = torch.from_numpy(u[:, :4] * values[:4])
    ratio = torch.pdist(found.double()) / torch.pdist(reference)
    assert float(ratio.std() / ratio.mean()) < 1e-5


def test_row_norm() -> None:
    assert row_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx((25 / 2) ** 0.5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_token_vectors_are_the_states_of_the_tokens_read_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny.checkpoint(family)
    monkeypatch.setattr(inits, "_ROWS", 7)  # the last batch is a smaller one
    found = token_vectors(teacher)
    assert found.shape == (int(teacher.config.vocab_size), int(teacher.config.hidden_size))
    tokenizer = teacher.tokenizer
    for word in ("good", "the"):
        token = tokenizer.convert_tokens_to_ids(word)
        made = tokenizer(word, return_tensors="pt")
        at = made["input_ids"][0].tolist().index(token)
        with torch.no_grad():
            output = teacher.model(input_ids=made["input_ids"], output_hidden_states=True)
        # One row or seven at once: other kernels, other order of the sums in single precision.
        assert torch.allclose(found[token], output.hidden_states[-1][0, at], atol=1e-5)


def test_token_vectors_tell_more_than_the_embedding() -> None:
    teacher = tiny.checkpoint()
    before = token_vectors(teacher)
    with torch.no_grad():
        layer: Any = teacher.model.get_submodule("bert.encoder.layer.1.output.dense")
        layer.weight.mul_(3.0)
    # The table is untouched; what training did to the layers above shows.
    assert not torch.allclose(token_vectors(teacher), before, atol=1e-2)
