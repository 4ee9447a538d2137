"""Samples of rows: every label in its share, whatever the order of the file, and always the same ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdcli.inputs import sampling
from kdcli.inputs.text import Encoded
from kdcli.tasks import get


def encoded(labels: np.ndarray | None, count: int) -> Encoded:
    """Row i is the one token i."""
    ids = np.arange(count, dtype=np.int32)
    return Encoded(ids, np.zeros(count, dtype=np.int8), np.arange(count + 1), labels)


@pytest.mark.parametrize("sizes", [[500, 500], [900, 90, 10], [400, 300, 200, 99, 1], [7] * 50])
def test_every_beginning_has_every_label_in_its_share(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)  # sorted, as files are
    found = sampling.order(labels, len(labels), seed=3)
    assert np.array_equal(np.sort(found), np.arange(len(labels)))
    for count in range(len(sizes), len(labels), 13):
        have = np.bincount(labels[found[:count]], minlength=len(sizes))
        assert have.min() >= 1
        share = count * np.array(sizes) / len(labels)
        # To one row by the jitter, and what the promised row of each rarer label takes from the others.
        room = 1 + np.maximum(1 - share, 0).sum()
        assert (np.abs(have - np.maximum(share, 1)) <= room).all()


def test_fewer_rows_than_labels_are_of_different_labels_the_frequent_ones_first() -> None:
    labels = np.repeat(np.arange(5), [1, 50, 3, 20, 100])
    assert labels[sampling.order(labels, len(labels), seed=0)[:3]].tolist() == [4, 1, 3]


def test_rows_of_a_label_are_drawn_evenly() -> None:
    labels = np.repeat([0, 1], 10)
    often = np.zeros(20)
    for seed in range(2000):
        often[sampling.positions(labels, 20, 4, seed)] += 1
    # Each is in with probability 0.2: a standard deviation of sqrt(2000 * 0.2 * 0.8) = 17.9; five of them.
    assert (np.abs(often - 400) < 90).all()


def test_the_order_of_the_file_does_not_matter_for_the_shares() -> None:
    labels = np.tile([0, 1], 40)
    for arranged in (labels, np.sort(labels), np.sort(labels)[::-1]):
        assert np.bincount(arranged[sampling.positions(arranged, 80, 10, 0)]).tolist() == [5, 5]


def test_rows_without_a_label_have_their_share_but_no_promise() -> None:
    labels = np.concatenate([np.full(90, -100), np.repeat([0, 1], 5)])
    found = labels[sampling.order(labels, 100, seed=1)]
    assert (found[:2] >= 0).all()
    assert 16 <= (found[:20] < 0).sum() <= 18
    assert np.array_equal(
        sampling.order(np.full(30, -100), 30, 1).argsort().argsort(), sampling.order(np.full(30, -1), 30, 1)
    )


def test_without_labels_rows_are_a_seeded_permutation() -> None:
    assert np.array_equal(np.sort(sampling.order(None, 50, 0)), np.arange(50))
    assert np.array_equal(sampling.order(None, 50, 0), sampling.order(None, 50, 0))
    assert not np.array_equal(sampling.order(None, 50, 0), sampling.order(None, 50, 1))
    assert len(sampling.order(None, 0, 0)) == len(sampling.order(np.zeros(0, dtype=np.int64), 0, 0)) == 0


def test_models_are_judged_on_whole_queries() -> None:
    queries = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 3))
    rows = replace(encoded(np.zeros(60, np.float32), 60), queries=queries)
    for count in (30, 31):
        found = sampling.judged(rows, count, 0, get("regression"))
        assert len(found) == 30
        assert np.bincount(found.queries, minlength=20).tolist().count(3) == 10
    assert len(np.unique(sampling.sample(rows, 30, 0, get("regression")).queries)) > 10  # parts of more
    assert len(sampling.judged(rows, 1, 0, get("regression"))) == 3  # one query at least
    assert sampling.judged(rows, 60, 0, get("regression")) is rows


def test_a_sample_keeps_the_order_of_the_rows_and_all_rows_stay_as_they_are() -> None:
    labels = np.repeat([0, 1, 2], 20)
    rows = encoded(labels, 60)
    some = sampling.sample(rows, 9, seed=0)
    assert (np.diff(some.ids) > 0).all()
    assert np.bincount(some.labels).tolist() == [3, 3, 3]
    assert np.array_equal(some.ids, sampling.sample(rows, 9, seed=0).ids)
    assert not np.array_equal(some.ids, sampling.sample(rows, 9, seed=1).ids)
    for count in (60, 1000):
        assert sampling.sample(rows, count, seed=0) is rows
        assert np.array_equal(sampling.positions(labels, 60, count, 0), np.arange(60))
    assert len(sampling.sample(encoded(None, 60), 9, seed=0)) == 9


@pytest.mark.parametrize(
    ("sizes", "count", "expected"), [([50, 50, 50], 10, [4, 3, 3]), ([2, 90, 30], 40, [2, 19, 19])]
)
def test_evenly_takes_as_many_of_each_group_as_there_are(
    sizes: list[int], count: int, expected: list[int]
) -> None:
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    found = sampling.evenly(groups, count, seed=5)
    assert len(set(found.tolist())) == count
    assert np.bincount(groups[found], minlength=len(sizes)).tolist() == expected
    assert not np.array_equal(found, sampling.evenly(groups, count, seed=6))
