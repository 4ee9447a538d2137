"""Shares of a batch, without any second process: their means add up to the mean of the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from kdcli import processes
from kdcli.training import distributed


def as_process(patch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    patch.setattr(processes, "rank", lambda: rank)
    patch.setattr(processes, "count", lambda: count)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_inside_a_block_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Otherwise the processes would meet a different number of times whenever the inner result is there already."""
    met = []

    class State:
        @contextlib.contextmanager
        def main_process_first(self) -> Iterator[None]:
            met.append("enter")
            yield
            met.append("leave")

    monkeypatch.setattr("accelerate.PartialState", State)
    as_process(monkeypatch, rank, 2)
    for _ in range(2):
        with distributed.first_then_others():
            for _ in range(rank):  # one process goes inside, the other need not
                with distributed.first_then_others():
                    met.append("inside")
    expected = ["enter", *["inside"] * rank, "leave"]
    assert met == expected * 2
    with pytest.raises(RuntimeError), distributed.first_then_others():
        raise RuntimeError
    met.clear()
    with distributed.first_then_others():
        pass
    assert met == ["enter", "leave"]  # an error does not leave the block open


def shares(patch: pytest.MonkeyPatch, rows: np.ndarray, count: int) -> list[tuple[np.ndarray, float]]:
    found = []
    for rank in range(count):
        as_process(patch, rank, count)
        found.append(distributed.share(rows))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12])
def test_shares_cover_every_row_once_and_their_means_are_its_mean(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    rng = np.random.default_rng(size)
    rows = rng.permutation(100)[:size]
    values = rng.normal(size=100)
    parts = shares(monkeypatch, rows, count)
    assert all(
        len(own) for own, _ in parts
    )  # every process has something to compute, or it would hang the others
    counted = np.concatenate([own for own, factor in parts if factor])
    assert sorted(counted) == sorted(rows)
    # What `average` does with gradients: the sum over the processes, divided by their number.
    mean = sum(factor * values[own].mean() for own, factor in parts) / count
    assert mean == pytest.approx(values[rows].mean(), rel=1e-12)  # float64 sums


def test_a_batch_smaller_than_the_processes_counts_zero_in_some(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shares(monkeypatch, np.array([7, 9]), 4)
    assert [own.tolist() for own, _ in parts] == [[7], [9], [7], [7]]
    assert [factor for _, factor in parts] == [2.0, 2.0, 0.0, 0.0]


def test_one_process_keeps_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, 0, 1)
    rows = np.array([3, 1, 2])
    own, factor = distributed.share(rows)
    assert own is rows
    assert factor == 1.0


@pytest.mark.parametrize("flag", [True, False])
def test_average_and_total_of_one_process_change_nothing(monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    as_process(monkeypatch, 0, 1)
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    gradient = torch.tensor([0.5, -2.0])
    one.grad = gradient
    assert distributed.average([one, two], flag) is flag
    assert one.grad is gradient
    assert gradient.tolist() == [0.5, -2.0]
    assert two.grad is None  # AdamW skips it, as in any other training
    values = torch.arange(4)
    assert distributed.total(values) is values
    assert distributed.each(values) == [values]
    with distributed.first_then_others():
        pass


@pytest.mark.parametrize(("mine", "theirs"), [(False, False), (True, False), (False, True), (True, True)])
def test_average_of_two_processes(monkeypatch: pytest.MonkeyPatch, mine: bool, theirs: bool) -> None:
    as_process(monkeypatch, 0, 2)
    one, two, three = (nn.Parameter(torch.zeros(size)) for size in ((2, 2), (3,), (1,)))
    one.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    two.grad = None  # here; the other process has a gradient
    other = [torch.full((4,), 10.0), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)]
    # Stands for the message: the other process's gradients and flag, in the same order.
    message = torch.cat([*other, torch.tensor([float(theirs)])])
    monkeypatch.setattr(distributed, "total", lambda values: values + message)
    assert distributed.average([one, two, three], mine) is (mine or theirs)
    assert one.grad.tolist() == [[5.5, 6.0], [6.5, 7.0]]
    assert two.grad is not None
    assert two.grad.tolist() == [0.5, 1.0, 1.5]
    assert three.grad is not None
    assert three.grad.tolist() == [0.0]
