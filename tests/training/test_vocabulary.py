"""What the teacher knows about single tokens is computed once, and is what its model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.models import checkpoint as checkpoints
from kdcli.models import inits, students
from kdcli.progress import Progress
from kdcli.training import vocabulary
from tests import tiny


@pytest.fixture
def teacher(tmp_path: Path):
    return checkpoints.load(tiny.saved(tmp_path / "teacher"))


def test_vectors_are_the_models_states_and_come_from_the_cache(
    teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = vocabulary.token_vectors(teacher, Progress())
    word = teacher.tokenizer.convert_tokens_to_ids("superb")
    ids = torch.tensor([[teacher.tokenizer.cls_token_id, word, teacher.tokenizer.sep_token_id]])
    with torch.inference_mode():
        want = teacher.model.bert(input_ids=ids).last_hidden_state[0, 1]
    assert torch.allclose(found[word], want, atol=1e-5)  # another batch size, float32
    monkeypatch.setattr(inits, "token_vectors", lambda _: pytest.fail("computed twice"))
    assert torch.equal(vocabulary.token_vectors(teacher, Progress()), found)


def test_neighbours_are_near_and_never_special(teacher) -> None:
    near = vocabulary.near_tokens(teacher, 3, Progress())
    vectors = torch.nn.functional.normalize(vocabulary.token_vectors(teacher, Progress()), dim=1)
    special = set(teacher.tokenizer.all_special_ids)
    assert near.shape == (len(vectors), 3)
    assert not special & set(near[[i for i in range(len(near)) if i not in special]].ravel().tolist())
    word = teacher.tokenizer.convert_tokens_to_ids("good")
    similar = (vectors @ vectors[word]).numpy()
    others = [i for i in range(len(vectors)) if i not in special and i != word]
    assert near[word].tolist() == sorted(others, key=lambda i: -similar[i])[:3]
    assert np.array_equal(near[sorted(special)], np.repeat(np.array(sorted(special))[:, None], 3, axis=1))


def test_a_narrower_student_starts_from_what_the_teacher_makes_of_tokens(teacher) -> None:
    def build(vectors):
        return students.build(
            "1x16",
            teacher,
            teacher.labels,
            {},
            init="teacher",
            seed=0,
            hub=lambda name: pytest.fail("not asked for"),
            resolve=lambda name: pytest.fail("not asked for"),
            vectors=vectors,
        )

    vectors = vocabulary.token_vectors(teacher, Progress())
    made, plain = build(lambda: vectors), build(None)
    assert "principal components" in made.notes[0]
    assert "SVD" in plain.notes[0]
    table = made.checkpoint.model.get_input_embeddings().weight.detach()
    # Principal components keep the distances of the centred vectors as well as 16 numbers can; the projected table
    # knows nothing of them.
    centred = vectors - vectors.mean(0)
    want = torch.cdist(centred, centred).flatten()

    def likeness(weights: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([torch.cdist(weights, weights).flatten(), want]))[0, 1])

    assert likeness(table) > 0.95
    assert likeness(table) > likeness(plain.checkpoint.model.get_input_embeddings().weight.detach())
    # As long as the table it stands in for, because positions are added to both.
    other = plain.checkpoint.model.get_input_embeddings().weight.detach()
    assert inits.row_norm(table) == pytest.approx(inits.row_norm(other), rel=1e-4)
