from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.models import neighbours
from kdcli.models.neighbours import nearest, token_groups

SIZE, WIDTH = 60, 7
GROUPS = np.array([i % 4 - 1 for i in range(SIZE)])  # a quarter is left out, three groups of 15


def table(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(seed))


def naive(vectors: np.ndarray, groups: np.ndarray, k: int) -> np.ndarray:
    rows = []
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i and groups[j] == groups[i] >= 0]
        lengths = [np.linalg.norm(vectors[j]) * np.linalg.norm(vectors[i]) for j in others]
        cosine = [float(vectors[j] @ vectors[i]) / length for j, length in zip(others, lengths, strict=True)]
        best = [others[at] for at in np.argsort(cosine)[::-1][:k]]
        rows.append(best + [i] * (k - len(best)))
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 5, 14])
def test_equals_the_definition(k: int) -> None:
    found = nearest(table(), k, GROUPS)
    assert found.dtype == np.int32
    assert np.array_equal(found, naive(table().double().numpy(), GROUPS, k))


def test_a_group_too_small_is_filled_with_the_token_itself() -> None:
    found = nearest(table(), 20, GROUPS)
    assert np.array_equal(found, naive(table().double().numpy(), GROUPS, 20))
    left_out = np.flatnonzero(GROUPS < 0)
    assert (found[left_out] == left_out[:, None]).all()
    alone = np.where(np.arange(SIZE) == 3, 0, -1)
    assert (nearest(table(), 2, alone)[3] == 3).all()


def test_blocks_change_nothing_and_length_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nearest(table(), 4, GROUPS)
    monkeypatch.setattr(neighbours, "_CELLS", 30)  # two rows at a time
    scaled = table() * torch.rand(SIZE, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert np.array_equal(nearest(scaled, 4, GROUPS), whole)


def test_groups_of_a_wordpiece_vocabulary() -> None:
    tokens = ["[PAD]", "[unused7]", "[CLS]", "bank", "##ing", "##s", "[", "money"]
    assert token_groups(tokens, [0, 2]).tolist() == [-1, -1, -1, 0, 1, 1, 0, 0]
    allowed = np.array([True] * 7 + [False])
    assert token_groups(tokens, [0, 2], allowed).tolist() == [-1, -1, -1, 0, 1, 1, 0, -1]


@pytest.mark.parametrize("mark", ["Ġ", "▁"])
def test_groups_of_a_vocabulary_that_marks_word_starts(mark: str) -> None:
    tokens = ["<s>", "</s>", f"{mark}bank", "ing", f"{mark}money", "s"]
    assert token_groups(tokens, [0, 1]).tolist() == [-1, -1, 0, 1, 0, 1]
