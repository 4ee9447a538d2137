"""TinyBERT's intermediate loss against loops, its masks and its one projection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.training.losses import tinybert
from kdcli.training.losses.tinybert import Config
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

LENGTHS = [6, 1, 3]  # real tokens of the three rows
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
STEP = Step(torch.zeros(3, dtype=torch.long), 0.5)
PAIRS = [(1, 2), (2, 4)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signals(layers: list[int], heads: int, size: int, seed: int, width: int | None = None) -> Signals:
    """Random signals; ``width`` tells the width of a token from H * E, as after pruning."""
    made: dict[str, dict[int, Tensor]] = {
        name: {n: random(heads, 6, size, seed=100 * seed + 10 * number + n) for n in layers}
        for number, name in enumerate(("query", "key"), 1)
    }
    states = {n: random(6, width or heads * size, seed=100 * seed + n) for n in [0, *layers]}
    return Signals(torch.zeros(3, 2), MASK, hidden=states, **made)


def padded(shown: Signals, value: float) -> Signals:
    def wider(layers: dict[int, Tensor]) -> dict[int, Tensor]:
        return {n: F.pad(x, (0, 0, 0, 4), value=value) for n, x in layers.items()}

    parts = {name: wider(dict(getattr(shown, name))) for name in ("hidden", "query", "key")}
    return Signals(shown.logits, F.pad(MASK, (0, 4)), **parts)


def setting(own: int, theirs: int, heads: tuple[int, int], config: Config | None = None) -> LossSetting:
    shapes = Shape(2, own, heads[0], 2, own), Shape(4, theirs, heads[1], 2, theirs)
    torch.manual_seed(0)
    projection = tinybert.trained(LossSetting(Config(), *shapes, PAIRS))
    return LossSetting(config or Config(), *shapes, PAIRS, projection and projection.double())


def score(query: np.ndarray, key: np.ndarray) -> float:
    return float(sum(a * b for a, b in zip(query, key, strict=True))) / math.sqrt(len(query))


def naive(student: Signals, teacher: Signals, projection: nn.Module | None, config: Config) -> float:
    """One token, one head at a time, over real tokens only."""
    attention = hidden = 0.0
    for own, theirs in PAIRS:
        s_q, s_k, t_q, t_k = (
            x.detach().numpy()
            for x in (student.query[own], student.key[own], teacher.query[theirs], teacher.key[theirs])
        )
        errors = []
        for row, length in enumerate(LENGTHS):
            for i in range(length):
                for j in range(length):
                    s = [score(s_q[row, h, i], s_k[row, h, j]) for h in range(s_q.shape[1])]
                    t = [score(t_q[row, h, i], t_k[row, h, j]) for h in range(t_q.shape[1])]
                    if len(s) != len(t):
                        s, t = [sum(s) / len(s)], [sum(t) / len(t)]
                    errors.extend((a - b) ** 2 for a, b in zip(s, t, strict=True))
        attention += sum(errors) / len(errors)
    for own, theirs in [(0, 0), *PAIRS]:
        s_h, t_h = student.hidden[own].detach().numpy(), teacher.hidden[theirs].detach().numpy()
        if projection is not None:
            weight, bias = (p.detach().numpy() for p in projection.parameters())
            s_h = s_h @ weight.T + bias
        errors = [
            (a - b) ** 2
            for row, length in enumerate(LENGTHS)
            for i in range(length)
            for a, b in zip(s_h[row, i], t_h[row, i], strict=True)
        ]
        hidden += sum(errors) / len(errors)
    return config.attention_weight * attention + config.hidden_weight * hidden


@pytest.mark.parametrize("config", [Config(), Config(attention_weight=0.3, hidden_weight=7)])
@pytest.mark.parametrize(
    ("heads", "sizes", "widths"),
    [
        ((4, 4), (3, 5), (12, 20)),
        ((2, 4), (4, 5), (8, 20)),
        ((2, 3), (3, 2), (6, 6)),
        ((1, 3), (2, 2), (6, 6)),
    ],
    ids=["equal heads", "other heads", "equal widths", "pruned heads"],
)
def test_against_the_naive_reference_and_with_more_padding(
    config: Config, heads: tuple[int, int], sizes: tuple[int, int], widths: tuple[int, int]
) -> None:
    made = setting(*widths, heads, config)
    student = signals([1, 2], heads[0], sizes[0], 0, widths[0])
    teacher = signals([2, 4], heads[1], sizes[1], 1, widths[1])
    assert (made.trained is None) == (widths[0] == widths[1])
    found = float(tinybert.term(student, teacher, made, STEP).detach())
    assert found == pytest.approx(naive(student, teacher, made.trained, config), rel=1e-12)
    again = tinybert.term(padded(student, 50.0), padded(teacher, -50.0), made, STEP)
    assert float(again.detach()) == pytest.approx(found, rel=1e-12)


def test_gradients_are_finite_and_reach_student_and_projection_only() -> None:
    made = setting(8, 20, (2, 4))
    student, teacher = signals([1, 2], 2, 4, 0), signals([2, 4], 4, 5, 1)
    parts = ("hidden", "query", "key")
    own = [x.requires_grad_() for name in parts for x in getattr(student, name).values()]
    theirs = [x.requires_grad_() for name in parts for x in getattr(teacher, name).values()]
    tinybert.term(student, teacher, made, STEP).backward()
    assert made.trained is not None
    for tensor in (*own, *made.trained.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad.abs().max()) > 0
    assert all(x.grad is None for x in theirs)


def test_one_projection_serves_all_layers() -> None:
    # A student whose layers all are the same linear map of the teacher's is done; one map for each layer is not.
    made = setting(8, 20, (2, 4), Config(attention_weight=0))
    assert isinstance(made.trained, nn.Linear)
    student, teacher = signals([1, 2], 2, 4, 0), signals([2, 4], 4, 5, 1)
    exact = {0: made.trained(student.hidden[0]), 2: made.trained(student.hidden[1])}
    for sign, low in ((1, True), (-1, False)):
        states = exact | {4: sign * made.trained(student.hidden[2])}
        shown = Signals(teacher.logits, MASK, hidden=states, query=teacher.query, key=teacher.key)
        value = float(tinybert.term(student, shown, made, STEP).detach())
        assert (value == 0) is low


def test_scores_before_the_softmax_see_what_probabilities_do_not() -> None:
    # A constant added to all scores of a query leaves its probabilities, and not the loss, unchanged.
    query, key = random(2, 6, 3, seed=0), random(2, 6, 3, seed=1)
    shifted = key + random(2, 1, 3, seed=2)  # q (k + c) = q k + q c, the same for every key
    s, t = tinybert.scores(query, key), tinybert.scores(query, shifted)
    torch.testing.assert_close(s.softmax(-1), t.softmax(-1), rtol=1e-10, atol=1e-12)
    states = random(6, 2, seed=3)
    assert float(tinybert.loss([(s, s)], [(states, states)], MASK, Config())) == 0
    assert float(tinybert.loss([(s, t)], [(states, states)], MASK, Config())) > 0.1


def test_half_precision_is_lifted() -> None:
    query, states = random(2, 6, 3, seed=0).bfloat16(), random(6, 2, seed=3).bfloat16()
    made = tinybert.scores(query, query)
    assert made.dtype == torch.float32
    # Exact products of the rounded inputs, summed in float32.
    torch.testing.assert_close(
        made.double(), tinybert.scores(query.double(), query.double()), rtol=1e-5, atol=1e-6
    )
    assert tinybert.loss([(made, made)], [(states, states)], MASK, Config()).dtype == torch.float32


def test_what_it_reads_and_what_it_says() -> None:
    made = setting(8, 8, (2, 4))
    layers = [frozenset({1, 2}), frozenset({2, 4})]
    assert tinybert.needs(made) == tuple(Needs(hidden=x | {0}, attention=x) for x in layers)
    note = tinybert.check(made)
    assert note is not None
    assert "the student has 2 attention heads and the teacher 4" in note
    assert tinybert.check(setting(8, 8, (2, 2))) is None
    with pytest.raises(UsageError, match="tinybert compares encoder layers, and the student has none"):
        tinybert.check(LossSetting(Config(), Shape(0, 8, 0, 2, 8), made.teacher))
