"""Attention transfer against loops and against the attentions of transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.losses import attention_transfer
from kdcli.training.losses.attention_transfer import Config, attention_map, loss
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step
from tests import tiny

LENGTHS = [9, 1, 4]  # real tokens of the three rows
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
STEP = Step(torch.zeros(3, dtype=torch.long), 0.5)
SETTING = LossSetting(Config(), Shape(2, 8, 2, 2, 8), Shape(4, 15, 3, 2, 15), [(1, 2), (2, 4)])


def random(heads: int, size: int, seed: int) -> Tensor:
    return torch.randn(3, heads, 9, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signals(layers: list[int], heads: int, size: int, seed: int) -> Signals:
    query, key = ({n: random(heads, size, 100 * seed + 10 * number + n) for n in layers} for number in (1, 2))
    return Signals(torch.zeros(3, 2), MASK, query=query, key=key)


def naive_map(query: np.ndarray, key: np.ndarray, length: int) -> list[float]:
    """Map (T * T) of one row (H, T, E): softmax over the real keys, mean over heads, head by head."""
    heads, _, size = query.shape
    flat = []
    for i in range(length):
        rows = []
        for h in range(heads):
            e = [math.exp(float(query[h, i] @ key[h, j]) / math.sqrt(size)) for j in range(length)]
            rows.append([x / sum(e) for x in e])
        flat.extend(sum(row[j] for row in rows) / heads for j in range(length))
    return flat


def naive(student: Signals, teacher: Signals) -> float:
    total = 0.0
    for own, theirs in SETTING.pairs:
        s_q, s_k, t_q, t_k = (
            x.detach().numpy()
            for x in (student.query[own], student.key[own], teacher.query[theirs], teacher.key[theirs])
        )
        for row, length in enumerate(LENGTHS):
            s, t = naive_map(s_q[row], s_k[row], length), naive_map(t_q[row], t_k[row], length)
            length_s, length_t = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
            total += sum((a / length_s - b / length_t) ** 2 for a, b in zip(s, t, strict=True))
    return total / len(LENGTHS) / len(SETTING.pairs)


def test_against_the_naive_reference_with_other_heads_and_widths_and_more_padding() -> None:
    student, teacher = signals([1, 2], 2, 4, 0), signals([2, 4], 3, 5, 1)
    found = float(attention_transfer.term(student, teacher, SETTING, STEP))
    assert found == pytest.approx(naive(student, teacher), rel=1e-12)
    wide = []
    for shown, value in ((student, 40.0), (teacher, -40.0)):
        query, key = (
            {n: F.pad(x, (0, 0, 0, 5), value=value) for n, x in y.items()} for y in (shown.query, shown.key)
        )
        wide.append(Signals(shown.logits, F.pad(MASK, (0, 5)), query=query, key=key))
    again = float(attention_transfer.term(wide[0], wide[1], SETTING, STEP))
    assert again == pytest.approx(found, rel=1e-12)


def test_maps_are_the_attentions_of_transformers() -> None:
    model, batch = tiny.checkpoint("bert").model, tiny.batch("bert")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
        for number, layer in enumerate(model.bert.encoder.layer):
            below, own = output.hidden_states[number], layer.attention.self
            query, key = (
                p(below).unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2)
                for p in (own.query, own.key)
            )
            mask = batch["attention_mask"].bool()
            want = output.attentions[number].mean(1) * (mask[:, :, None] & mask[:, None, :])
            # Two orders of summation in float32, on probabilities.
            torch.testing.assert_close(attention_map(query, key, mask), want, rtol=1e-4, atol=1e-6)
            assert bool((~mask).any())


def test_gradients_are_finite_and_do_not_reach_the_teacher() -> None:
    student, teacher = signals([1, 2], 2, 4, 0), signals([2, 4], 3, 5, 1)
    own = [x.requires_grad_() for y in (student.query, student.key) for x in y.values()]
    theirs = [x.requires_grad_() for y in (teacher.query, teacher.key) for x in y.values()]
    attention_transfer.term(student, teacher, SETTING, STEP).backward()
    for tensor in own:
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad[0].abs().max()) > 0
        # A row of one token can only look at itself, and padding does not count.
        assert float(tensor.grad[1].abs().max()) < 1e-15
        assert float(tensor.grad.transpose(1, 2)[~MASK].abs().max()) == 0
    assert all(x.grad is None for x in theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_stay_finite_in_any_precision(dtype: torch.dtype) -> None:
    query = (random(2, 4, 0) * 100).to(dtype).requires_grad_()
    found = attention_map(query, (random(2, 4, 1) * 100).to(dtype), MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1).detach(), MASK.float(), rtol=1e-6, atol=1e-6)
    loss(found, torch.ones(3, 9, 9) * MASK[:, None] * MASK[..., None], Config()).backward()
    assert query.grad is not None
    assert bool(torch.isfinite(query.grad).all())


def test_only_where_a_layer_looks_counts() -> None:
    # A rotation of the features, another order of the heads, a head said twice: the layer looks at the same places.
    query, key = random(2, 4, 0), random(2, 4, 1)
    rotation = torch.linalg.qr(random(1, 9, 2)[0, 0, :4, :4]).Q
    want = attention_map(query, key, MASK)
    for q, k in (
        (query @ rotation, key @ rotation),
        (query.flip(1), key.flip(1)),
        (query.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1)),
    ):
        assert float(loss(attention_map(q, k, MASK), want, Config())) == pytest.approx(0, abs=1e-15)
    assert float(loss(attention_map(-query, key, MASK), want, Config())) > 0.1


def test_maps_without_a_common_place_are_farthest() -> None:
    diagonal = torch.eye(4)[None]
    assert float(loss(diagonal, diagonal.flip(1), Config())) == pytest.approx(2, rel=1e-6)


def test_what_it_reads_and_where_it_is_refused() -> None:
    found = attention_transfer.needs(SETTING)
    assert found == (Needs(attention=frozenset({1, 2})), Needs(attention=frozenset({2, 4})))
    assert attention_transfer.METHOD.trained(SETTING) is None
    attention_transfer.check(SETTING)
    with pytest.raises(
        UsageError, match="attention-transfer compares encoder layers, and the student has none"
    ):
        attention_transfer.check(LossSetting(Config(), Shape(0, 8, 0, 2, 8), SETTING.teacher))
