"""Hidden state distillation against loops, its masks, and the projection that it trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.training.losses import hidden
from kdcli.training.losses.hidden import Config, loss
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

LENGTHS = [7, 1, 4]  # real tokens of the three rows
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
STEP = Step(torch.zeros(3, dtype=torch.long), 0.5)


def states(features: int, seed: int = 0) -> Tensor:
    return torch.randn(3, 7, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signals(hidden: dict[int, Tensor], mask: Tensor = MASK) -> Signals:
    return Signals(torch.zeros(3, 2), mask, hidden=hidden)


def setting(own: int, theirs: int, config: Config | None = None) -> LossSetting:
    """Two student layers follow the second and the fourth of four teacher layers."""
    made = LossSetting(
        config or Config(), Shape(2, own, 1, 2, own), Shape(4, theirs, 1, 2, theirs), [(1, 2), (2, 4)]
    )
    torch.manual_seed(0)
    projections = hidden.trained(made)
    return LossSetting(
        made.config, made.student, made.teacher, made.pairs, projections and projections.double()
    )


def naive(student: np.ndarray, teacher: np.ndarray, distance: str) -> float:
    """Token by token over the real tokens only."""
    values = []
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            s, t = student[row, token], teacher[row, token]
            if distance == "mse":
                values.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
            else:
                dot = sum(a * b for a, b in zip(s, t, strict=True))
                values.append(1 - dot / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t)))
    return sum(values) / len(values)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        # The rounding of the inputs is shared with the reference; the arithmetic is in float32.
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_against_the_naive_reference(
    distance: str, dtype: torch.dtype, result: torch.dtype, tolerance: float
) -> None:
    student, teacher = states(5, 0).to(dtype), states(5, 1).to(dtype)
    found = loss(student, teacher, MASK, Config(distance=distance))
    assert found.dtype == result
    want = naive(student.double().numpy(), teacher.double().numpy(), distance)
    assert float(found) == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_term_projects_every_pair_and_ignores_padding(distance: str) -> None:
    made = setting(3, 5, Config(distance=distance))
    own, theirs = {1: states(3, 0), 2: states(3, 1)}, {2: states(5, 2), 4: states(5, 3)}
    assert isinstance(made.trained, nn.ModuleList)
    want = []
    for project, mine, other in zip(made.trained, (1, 2), (2, 4), strict=True):
        weight, bias = (p.detach().numpy() for p in project.parameters())
        want.append(naive(own[mine].numpy() @ weight.T + bias, theirs[other].numpy(), distance))
    found = hidden.term(signals(own), signals(theirs), made, STEP).detach()
    assert float(found) == pytest.approx(sum(want) / 2, rel=1e-12)
    # Padding of any content, even one that no model would give.
    padded = [{k: F.pad(v, (0, 0, 0, 3), value=float("nan")) for k, v in x.items()} for x in (own, theirs)]
    wide = F.pad(MASK, (0, 3))
    again = hidden.term(signals(padded[0], wide), signals(padded[1], wide), made, STEP)
    assert float(again.detach()) == pytest.approx(float(found), rel=1e-12)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_gradients_are_finite_and_reach_student_and_projections_only(distance: str) -> None:
    made = setting(3, 5, Config(distance=distance))
    own = {n: states(3, n).requires_grad_() for n in (1, 2)}
    theirs = {n: states(5, n).requires_grad_() for n in (2, 4)}
    hidden.term(signals(own), signals(theirs), made, STEP).backward()
    assert made.trained is not None
    for tensor in (*own.values(), *made.trained.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad.abs().max()) > 0
    assert own[1].grad is not None
    assert float(own[1].grad[~MASK].abs().max()) == 0
    assert [t.grad for t in theirs.values()] == [None, None]


def lowest(own: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    """The loss that is left when only the projections are trained."""
    made = setting(3, 5)
    assert made.trained is not None
    optimizer = torch.optim.LBFGS(made.trained.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = hidden.term(signals(own), signals(theirs), made, STEP)
        value.backward()
        return value

    optimizer.step(closure)
    return float(closure().detach())


def test_a_projection_recovers_a_linear_map_from_narrow_to_wide() -> None:
    # What the projection is for: a student that holds the teacher's states up to a linear map has nothing to learn.
    matrix = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    own = {1: states(3, 0), 2: states(3, 1)}
    # LBFGS stops where a step changes the loss by less than 1e-9.
    assert lowest(own, {2: own[1] @ matrix - 1, 4: own[2] @ matrix}) < 1e-8
    # Twelve tokens of five features have more to say than the 20 numbers of a projection.
    assert lowest(own, {2: states(5, 2), 4: states(5, 3)}) > 0.1


def test_only_mse_sees_the_length_of_a_state() -> None:
    student = states(5)
    assert float(loss(3 * student, student, MASK, Config(distance="cosine"))) == pytest.approx(0, abs=1e-12)
    real = student[MASK]
    assert float(loss(3 * student, student, MASK, Config())) == pytest.approx(float(4 * (real**2).mean()))


def test_what_it_reads_and_where_it_is_refused() -> None:
    made = setting(5, 5)
    assert made.trained is None
    assert hidden.needs(made) == (Needs(hidden=frozenset({1, 2})), Needs(hidden=frozenset({2, 4})))
    hidden.check(made)
    with pytest.raises(UsageError, match="hidden compares encoder layers, and the student has none"):
        hidden.check(LossSetting(Config(), Shape(0, 5, 0, 2, 5), made.teacher))
