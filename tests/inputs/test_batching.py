from __future__ import annotations

import numpy as np
import pytest

from kdcli.inputs.batching import (
    collate,
    equal_length_batches,
    inference_batches,
    padding_share,
    train_batches,
)
from kdcli.inputs.text import Encoded


def encoded_of(lengths: list[int]) -> Encoded:
    """Row ``i`` holds the tokens ``100 * (i + 1) + 0, 1, 2, ...``."""
    ids = np.concatenate([100 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(ids, (ids % 2).astype(np.int8), offsets, None)


LENGTHS = np.random.default_rng(1).integers(3, 40, 517)


def test_collate_pads_on_the_right() -> None:
    batch = collate(encoded_of([2, 3, 1]), [1, 2], pad_id=7, type_pad=5)
    assert batch["input_ids"].tolist() == [[200, 201, 202], [300, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 5, 5]]
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int64)}


def test_collate_to_a_given_width() -> None:
    encoded = encoded_of([2, 1])
    assert collate(encoded, np.array([1]), 0, width=4)["input_ids"].tolist() == [[200, 0, 0, 0]]
    with pytest.raises(ValueError, match="row of 2 tokens does not fit into width 1"):
        collate(encoded, [0, 1], 0, width=1)


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_every_row_comes_exactly_once(batch_size: int) -> None:
    for batches in (
        train_batches(LENGTHS, batch_size, 3, 0, window=4),
        inference_batches(LENGTHS, batch_size),
        equal_length_batches(LENGTHS, batch_size),
    ):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
        assert max(map(len, batches)) <= batch_size


def test_no_rows_make_no_batches() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert train_batches(none, 4, 0, 0) == inference_batches(none, 4) == equal_length_batches(none, 4) == []
    assert padding_share(none, []) == 0.0


def test_train_batches_depend_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(train_batches(LENGTHS, 16, seed, epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_train_batches_have_one_short_batch_and_no_order_by_length() -> None:
    batches = train_batches(LENGTHS, 16, 0, 0, window=4)
    assert sorted(map(len, batches)) == [517 % 16] + [16] * (517 // 16)
    means = np.array([LENGTHS[b].mean() for b in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_windows_save_padding() -> None:
    shares = [padding_share(LENGTHS, train_batches(LENGTHS, 16, 0, 0, window=w)) for w in (1, 8)]
    assert shares[1] < 0.5 * shares[0]


def test_inference_starts_with_the_longest() -> None:
    order = LENGTHS[np.concatenate(inference_batches(LENGTHS, 16))]
    assert (np.diff(order) <= 0).all()


def test_equal_length_batches_need_no_padding_and_no_more_batches_than_that_takes() -> None:
    batches = equal_length_batches(LENGTHS, 8)
    assert all(len(set(LENGTHS[b].tolist())) == 1 for b in batches)
    _, counts = np.unique(LENGTHS, return_counts=True)
    assert len(batches) == int(np.ceil(counts / 8).sum())
    assert padding_share(LENGTHS, batches) == 0.0


def test_padding_share_by_hand() -> None:
    assert padding_share(np.array([4, 2, 3]), [np.array([0, 1]), np.array([2])]) == pytest.approx(2 / 11)


def test_padding_goes_to_the_left_where_its_id_says_so_and_segments_only_where_there_are_some() -> None:
    class Left(int):
        left = True

    rows = Encoded(np.array([7, 8, 9], np.int32), None, np.array([0, 1, 3]), None)
    batch = collate(rows, [0, 1], Left(5), width=3)
    assert batch["input_ids"].tolist() == [[5, 5, 7], [5, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert batch.keys() == {"input_ids", "attention_mask"}
