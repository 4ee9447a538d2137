"""Relation distillation against loops, its relation heads and what it leaves the student free to do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.losses import minilm
from kdcli.training.losses.minilm import Config, loss, relation_heads, relations
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

LENGTHS = [9, 1, 4]  # real tokens of the three rows
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


def random(heads: int, size: int, seed: int) -> Tensor:
    return torch.randn(3, heads, 9, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def three(heads: int, size: int, seed: int) -> list[Tensor]:
    """Queries, keys and values."""
    return [random(heads, size, 10 * seed + n) for n in range(3)]


def setting(config: Config | None = None, student_layers: int = 2, teacher_layers: int = 4) -> LossSetting:
    shapes = Shape(student_layers, 8, 2, 2, 8), Shape(teacher_layers, 12, 3, 2, 12)
    return LossSetting(config or Config(), *shapes, [(1, 2), (2, 4)])


def naive_relation(vectors: np.ndarray, heads: int, length: int) -> np.ndarray:
    """Probabilities (A_r, length, length) of one row (H, T, E), one product at a time."""
    whole = np.concatenate(list(vectors), axis=1)[:length]  # heads side by side, padding cut off
    size = whole.shape[1] // heads
    found = np.zeros((heads, length, length))
    for a in range(heads):
        part = whole[:, a * size : (a + 1) * size]
        for i in range(length):
            e = [math.exp(float(part[i] @ part[j]) / math.sqrt(size)) for j in range(length)]
            found[a, i] = [x / sum(e) for x in e]
    return found


def naive(student: list[Tensor], teacher: list[Tensor], heads: int) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for row, length in enumerate(LENGTHS):
            p = naive_relation(t[row].detach().numpy(), heads, length)
            q = naive_relation(s[row].detach().numpy(), heads, length)
            divergence = 0.0
            for a in range(heads):
                for i in range(length):
                    divergence += sum(p[a, i, j] * math.log(p[a, i, j] / q[a, i, j]) for j in range(length))
            total += divergence / heads / length / len(LENGTHS)
    return total


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 4), (3, 4)), ((2, 2), (2, 6)), ((1, 4), (4, 4)), ((4, 3), (4, 3))]
)
def test_against_the_naive_reference_and_with_more_padding(
    heads: int, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    own, theirs = three(*student, seed=0), three(*teacher, seed=1)
    config = Config(relation_heads=heads)
    found = float(loss(own, theirs, MASK, config))
    assert found == pytest.approx(naive(own, theirs, heads), rel=1e-10)
    wide = [[F.pad(x, (0, 0, 0, 5), value=v) for x in y] for y, v in ((own, 30.0), (theirs, -30.0))]
    assert float(loss(*wide, F.pad(MASK, (0, 5)), config)) == pytest.approx(found, rel=1e-12)


def test_the_direction_is_teacher_to_student() -> None:
    # Flat relations of the student against sharp ones of the teacher, or the two ways would be nearly equal.
    own, theirs = [0.3 * x for x in three(2, 4, 0)], three(3, 4, 1)
    assert abs(naive(theirs, own, 2) - float(loss(own, theirs, MASK, Config(relation_heads=2)))) > 0.01


def test_gradients_are_finite_and_do_not_reach_the_teacher() -> None:
    own, theirs = three(2, 4, 0), three(3, 4, 1)
    for tensor in (*own, *theirs):
        tensor.requires_grad_()
    loss(own, theirs, MASK, Config(relation_heads=2)).backward()
    for tensor in own:
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad[0].abs().max()) > 0
        assert float(tensor.grad.transpose(1, 2)[~MASK].abs().max()) == 0
    assert all(x.grad is None for x in theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_products_stay_finite_in_any_precision(dtype: torch.dtype) -> None:
    own = [(60 * x).to(dtype).requires_grad_() for x in three(2, 4, 0)]
    found = loss(own, [(60 * x).to(dtype) for x in three(3, 4, 1)], MASK, Config(relation_heads=2))
    assert found.dtype == torch.float32
    found.backward()
    for tensor in own:
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


def test_a_rotation_inside_the_relation_heads_changes_nothing() -> None:
    # What relations are for: the student may keep its vectors in axes of its own, so nothing has to be projected.
    teacher = three(2, 6, 1)
    rotation = torch.linalg.qr(random(1, 9, 5)[0, 0, :6, :6]).Q
    rotated = [x @ rotation for x in teacher]
    config = Config(relation_heads=2)  # relation heads that are the attention heads
    assert float(loss(rotated, teacher, MASK, config)) == pytest.approx(0, abs=1e-12)
    assert float(F.mse_loss(rotated[0], teacher[0])) > 0.5
    # A rotation across the borders of relation heads is seen.
    assert float(loss(rotated, teacher, MASK, Config(relation_heads=4))) > 0.01


def test_only_the_concatenated_width_counts_not_the_attention_heads() -> None:
    vectors = random(4, 3, 0)
    split_otherwise = vectors.transpose(1, 2).flatten(2).unflatten(2, (2, 6)).transpose(1, 2)
    torch.testing.assert_close(relations(vectors, 3, MASK), relations(split_otherwise, 3, MASK))


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [
        (384, 768, 48),  # the small student and the base teacher of the paper
        (768, 768, 48),
        (312, 768, 24),  # TinyBERT's width; 48 does not divide 312
        (192, 768, 24),  # 48 would leave 4 features
        (128, 768, 8),
        (704, 768, 8),  # eleven heads left of twelve
        (8, 12, 1),
        (7, 768, 1),
        (4, 4, 1),  # fewer than 8 features anyway
    ],
)
def test_relation_heads_are_chosen_by_both_widths(student: int, teacher: int, heads: int) -> None:
    assert relation_heads(student, teacher, Config()) == heads
    assert relation_heads(teacher, student, Config()) == heads


def test_relation_heads_that_do_not_divide_both_widths_are_refused() -> None:
    assert relation_heads(384, 768, Config(relation_heads=64)) == 64
    with pytest.raises(UsageError, match=r"relation_heads=64 does not divide .* 312 \(student\) and 768"):
        relation_heads(312, 768, Config(relation_heads=64))


@pytest.mark.parametrize(("given", "layer"), [(0, 4), (3, 3)])
def test_the_last_student_layer_follows_one_teacher_layer(given: int, layer: int) -> None:
    made = setting(Config(teacher_layer=given, relation_heads=2))
    minilm.check(made)
    assert minilm.needs(made) == (Needs(attention=frozenset({2})), Needs(attention=frozenset({layer})))
    assert minilm.METHOD.trained(made) is None
    shown = []
    for number, vectors in ((2, three(2, 4, 0)), (layer, three(3, 4, 1))):
        query, key, value = ({number: x} for x in vectors)
        shown.append(Signals(torch.zeros(3, 2), MASK, query=query, key=key, value=value))
    found = minilm.term(shown[0], shown[1], made, Step(torch.zeros(3, dtype=torch.long), 0.5))
    assert float(found) == float(loss(three(2, 4, 0), three(3, 4, 1), MASK, made.config))


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="teacher_layer=5, but the teacher has 4 layers; give 1 to 4"):
        minilm.check(setting(Config(teacher_layer=5)))
    with pytest.raises(UsageError, match="minilm compares encoder layers, and the student has none"):
        minilm.check(setting(student_layers=0))
