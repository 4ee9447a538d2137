"""Patient distillation against loops, the layers it compares and what the reference code makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.training import layer_map
from kdcli.training.losses import pkd
from kdcli.training.losses.pkd import Config, loss
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

MASK = torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
STEP = Step(torch.zeros(4, dtype=torch.long), 0.5)


def states(features: int, seed: int = 0) -> Tensor:
    return torch.randn(4, 6, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signals(hidden: dict[int, Tensor], mask: Tensor = MASK) -> Signals:
    return Signals(torch.zeros(4, 2), mask, hidden=hidden)


def setting(own: int, theirs: int, pairs: list[tuple[int, int]]) -> LossSetting:
    made = LossSetting(Config(), Shape(3, own, 1, 2, own), Shape(6, theirs, 1, 2, theirs), pairs)
    torch.manual_seed(0)
    projections = pkd.trained(made)
    return LossSetting(made.config, made.student, made.teacher, pairs, projections and projections.double())


def naive(student: np.ndarray, teacher: np.ndarray) -> float:
    """Squared differences of unit vectors, summed over features, averaged over rows."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        length_s, length_t = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
        total += sum((a / length_s - b / length_t) ** 2 for a, b in zip(s, t, strict=True))
    return total / len(student)


@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        # The rounding of the inputs is shared with the reference; the arithmetic is in float32.
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_against_the_naive_reference(dtype: torch.dtype, result: torch.dtype, tolerance: float) -> None:
    student, teacher = states(5, 0)[:, 0].to(dtype), states(5, 1)[:, 0].to(dtype)
    found = loss(student, teacher, Config())
    assert found.dtype == result
    want = naive(student.double().numpy(), teacher.double().numpy())
    assert float(found) == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("features", [5, 768])
def test_the_mean_over_features_of_the_reference_code_is_smaller_by_their_number(features: int) -> None:
    student, teacher = states(features, 0)[:, 0], states(features, 1)[:, 0]
    mean = F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher, dim=1))
    assert float(loss(student, teacher, Config())) == pytest.approx(features * float(mean), rel=1e-12)


def test_the_last_student_layer_is_left_to_the_response() -> None:
    uniform = setting(5, 5, layer_map.resolve("uniform", 3, 6))
    assert pkd.needs(uniform) == (Needs(hidden=frozenset({1, 2})), Needs(hidden=frozenset({2, 4})))
    # Unless there is nothing else.
    last = setting(5, 5, layer_map.resolve("last", 3, 6))
    assert pkd.needs(last) == (Needs(hidden=frozenset({3})), Needs(hidden=frozenset({6})))
    one = setting(5, 5, [(2, 5)])
    assert pkd.needs(one) == (Needs(hidden=frozenset({2})), Needs(hidden=frozenset({5})))


def test_the_term_is_the_mean_over_the_compared_pairs_of_projected_first_tokens() -> None:
    made = setting(3, 5, [(1, 2), (2, 4), (3, 6)])
    own, theirs = {1: states(3, 0), 2: states(3, 1)}, {2: states(5, 2), 4: states(5, 3)}
    assert isinstance(made.trained, nn.ModuleList)
    assert len(made.trained) == 2
    want = []
    for project, mine, other in zip(made.trained, (1, 2), (2, 4), strict=True):
        weight, bias = (p.detach().numpy() for p in project.parameters())
        want.append(naive(own[mine][:, 0].numpy() @ weight.T + bias, theirs[other][:, 0].numpy()))
    found = float(pkd.term(signals(own), signals(theirs), made, STEP).detach())
    assert found == pytest.approx(sum(want) / 2, rel=1e-12)
    padded = [{k: F.pad(v, (0, 0, 0, 3), value=float("nan")) for k, v in x.items()} for x in (own, theirs)]
    wide = F.pad(MASK, (0, 3))
    again = pkd.term(signals(padded[0], wide), signals(padded[1], wide), made, STEP)
    assert float(again.detach()) == found


def test_gradients_are_finite_and_reach_first_tokens_and_projections_only() -> None:
    made = setting(3, 5, [(1, 2), (2, 4), (3, 6)])
    own = {n: states(3, n).requires_grad_() for n in (1, 2)}
    theirs = {n: states(5, n).requires_grad_() for n in (2, 4)}
    pkd.term(signals(own), signals(theirs), made, STEP).backward()
    assert made.trained is not None
    for tensor in (*own.values(), *made.trained.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert float(tensor.grad.abs().max()) > 0
    for tensor in own.values():
        assert tensor.grad is not None
        assert float(tensor.grad[:, 1:].abs().max()) == 0
    assert [t.grad for t in theirs.values()] == [None, None]


def test_only_the_direction_counts() -> None:
    # What the normalisation is for: layers whose states grow with the depth weigh the same.
    student, teacher = states(5, 0)[:, 0], states(5, 1)[:, 0]
    scales = torch.tensor([[0.01], [1.0], [30.0], [1000.0]], dtype=torch.float64)
    want = float(loss(student, teacher, Config()))
    assert float(loss(student * scales, teacher / scales, Config())) == pytest.approx(want, rel=1e-12)
    assert float(F.mse_loss(student * scales, teacher / scales)) > 100 * float(F.mse_loss(student, teacher))
    assert float(loss(student * scales, student, Config())) == pytest.approx(0, abs=1e-12)
    assert float(loss(-student, student, Config())) == pytest.approx(4, rel=1e-12)


def test_models_without_layers_are_refused() -> None:
    made = setting(5, 5, [(1, 2)])
    assert made.trained is None
    pkd.check(made)
    with pytest.raises(UsageError, match="pkd compares encoder layers, and the teacher has none"):
        pkd.check(LossSetting(Config(), made.student, Shape(0, 5, 0, 2, 5)))
