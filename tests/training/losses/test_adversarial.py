"""Adversarial distillation: both losses against loops, who learns when, and a resumed game."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.training.losses import adversarial
from kdcli.training.losses.adversarial import Adversary, Config, Game, loss
from kdcli.training.terms import LossSetting, Needs, Shape, Signals, Step

ROWS = 16


def vectors(features: int, seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def setting(config: Config | None = None, own: int = 3, theirs: int = 5, seed: int = 0) -> LossSetting:
    made = LossSetting(config or Config(), Shape(0, own, 0, 2, own), Shape(4, theirs, 1, 2, theirs))
    torch.manual_seed(seed)
    return LossSetting(made.config, made.student, made.teacher, (), adversarial.trained(made))


def game(made: LossSetting) -> Game:
    assert isinstance(made.trained, Game)
    return made.trained


def play(made: LossSetting, own: Tensor, theirs: Tensor, progress: float = 0.5) -> Tensor:
    """One call of the term; the logits are the vectors' first two features."""
    mask = torch.ones(len(own), 1, dtype=torch.bool)
    shown = [Signals(x[:, :2], mask, pooled=x) for x in (own, theirs)]
    return adversarial.term(shown[0], shown[1], made, Step(torch.zeros(len(own), dtype=torch.long), progress))


def naive(judged: np.ndarray, teacher: bool) -> float:
    total = 0.0
    for x in judged:
        probability = 1 / (1 + math.exp(-float(x)))
        total -= math.log(probability if teacher else 1 - probability)
    return total / len(judged)


@pytest.mark.parametrize("teacher", [True, False])
def test_the_loss_against_the_naive_reference(teacher: bool) -> None:
    judged = 3 * vectors(1, 0)[:, 0]
    # The tolerance is float32's.
    assert float(loss(judged, teacher)) == pytest.approx(naive(judged.numpy(), teacher), rel=1e-5)
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss(far, teacher).backward()
    assert far.grad is not None
    assert bool(torch.isfinite(far.grad).all())


def test_both_sides_against_the_naive_reference() -> None:
    torch.manual_seed(0)
    adversary, own, theirs = Adversary(5, Config(neurons=4)), vectors(5, 0), vectors(5, 1)
    with torch.no_grad():
        judged_own, judged_theirs = (adversary.judge(x).numpy() for x in (own, theirs))
    fooled = float(adversary.fool(own).detach())
    assert fooled == pytest.approx(naive(judged_own, True), rel=1e-5)
    want = (naive(judged_own, False) + naive(judged_theirs, True)) / 2
    assert float(adversary.update(own, theirs)) == pytest.approx(want, rel=1e-5)


def test_both_losses_are_log_two_when_the_two_cannot_be_told_apart() -> None:
    adversary = Adversary(5, Config())
    nn.init.zeros_(adversary.net[-1].weight)
    nn.init.zeros_(adversary.net[-1].bias)
    same = vectors(5, 0)
    assert float(adversary.fool(same).detach()) == pytest.approx(math.log(2), rel=1e-6)
    for _ in range(50):  # the best discriminator of one distribution from itself stays there
        last = adversary.update(same, same)
    assert float(last) == pytest.approx(math.log(2), abs=1e-6)


def test_each_side_learns_from_its_own_loss_only() -> None:
    made = setting()
    own, theirs = vectors(3, 0).requires_grad_(), vectors(5, 1).requires_grad_()
    before = game(made).tensors()
    value = play(made, own, theirs)
    after = game(made).tensors()
    assert not torch.equal(before["net.0.weight"], after["net.0.weight"])
    assert [t.grad for t in (own, *game(made).parameters())] == [None, None, None]
    value.backward()
    for tensor in (own, *game(made).parameters()):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().max()) > 0
    assert theirs.grad is None
    assert [p.grad for p in game(made).adversary.parameters()] == [None] * 4


def test_the_students_optimizer_sees_the_projection_alone() -> None:
    made = setting()
    assert [name for name, _ in game(made).named_parameters()] == ["projection.weight", "projection.bias"]
    assert list(game(made).state_dict()) == ["projection.weight", "projection.bias"]
    # But the discriminator moves with the module.
    game(made).double()
    assert {p.dtype for p in game(made).adversary.parameters()} == {torch.float64}
    assert play(made, vectors(3, 0), vectors(5, 1)).dtype == torch.float64
    assert list(game(setting(own=5)).parameters()) == []


def test_during_the_warm_up_only_the_discriminator_learns() -> None:
    made = setting(Config(warmup=0.3))
    before = game(made).tensors()
    value = play(made, vectors(3, 0).requires_grad_(), vectors(5, 1), progress=0.29)
    assert float(value) == 0
    assert not value.requires_grad
    assert not torch.equal(before["net.0.weight"], game(made).tensors()["net.0.weight"])
    assert float(play(made, vectors(3, 0), vectors(5, 1), progress=0.3).detach()) > 0.1


def run(made: LossSetting, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    values = []
    for step in steps:
        optimizer.zero_grad()
        value = play(made, vectors(3, step), vectors(5, 1000 + step) + 1)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


def test_a_resumed_game_is_byte_identical() -> None:
    made = setting()
    optimizer = torch.optim.SGD(game(made).parameters(), lr=0.1)
    run(made, optimizer, range(3))
    stored, projection = game(made).tensors(), {k: v.clone() for k, v in game(made).state_dict().items()}
    want, final = run(made, optimizer, range(3, 8)), game(made).tensors()

    other = setting(seed=1)
    game(other).load_state_dict(projection)
    game(other).restore(stored)
    assert run(other, torch.optim.SGD(game(other).parameters(), lr=0.1), range(3, 8)) == want
    found = game(other).tensors()
    assert found.keys() == final.keys()
    assert all(torch.equal(found[name], final[name]) for name in final)
    # The state of AdamW decides it: with the parameters alone the game goes on otherwise.
    game(other).load_state_dict(projection)
    adversary = Adversary(5, Config())
    adversary.restore({k: v for k, v in stored.items() if k.startswith("net.")})
    fresh = LossSetting(
        other.config, other.student, other.teacher, (), Game(game(other).projection, adversary)
    )
    assert run(fresh, torch.optim.SGD(game(fresh).parameters(), lr=0.1), range(3, 8)) != want


def test_unpaired_vectors_move_to_the_teachers_distribution() -> None:
    # What it exists for: no row of the student has a counterpart among the teacher's, only the clouds are compared.
    made = setting(Config(lr=1e-2), own=2, theirs=2)
    shift = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.05)
    goal = torch.tensor([2.0, -1.0])
    for step in range(300):
        optimizer.zero_grad()
        play(made, vectors(2, step, 64) + shift, vectors(2, 5000 + step, 64) + goal).backward()
        optimizer.step()
    # The start is 2.2 away; the game ends 0.3 to 0.6 away over seeds, it circles and never quite stops.
    assert float((shift.detach() - goal).norm()) < 1


def test_it_reads_pooled_vectors_or_logits() -> None:
    assert adversarial.needs(setting()) == (Needs(pooled=True), Needs(pooled=True))
    made = setting(Config(on="logits"))
    assert adversarial.needs(made) == (Needs(), Needs())
    assert list(game(made).parameters()) == []
    assert game(made).adversary.net[0].in_features == 2
    assert float(play(made, vectors(3, 0), vectors(5, 1)).detach()) > 0.1
