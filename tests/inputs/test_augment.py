from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from kdcli.inputs.augment import Origins, Rates, augment, unlike
from kdcli.inputs.text import Encoded, concatenate

CLS, SEP, PAD, UNK, MASK = 0, 1, 2, 3, 4
SPECIAL = (CLS, SEP, PAD, UNK, MASK)
VOCABULARY = 200
NONE = Rates(splice=0, window=0, swap=0, replace=0, mask=0, drop=0)
HARD = Rates(splice=0.5, window=0.5, swap=0.5, replace=0.9, mask=0.9, drop=1.0)
#: Token t may become t with its last digit changed: a neighbour is recognised by its tens.
NEIGHBOURS = np.arange(VOCABULARY)[:, None] // 10 * 10 + np.array([1, 4, 7])
NEIGHBOURS[: len(SPECIAL)] = np.arange(len(SPECIAL))[:, None]


def encoded(lists: list[list[int]], types: list[list[int]] | None = None) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    ids = np.array([t for x in lists for t in x], dtype=np.int32)
    given = types or [[0] * len(x) for x in lists]
    return Encoded(
        ids,
        np.array([t for x in given for t in x], dtype=np.int8),
        offsets,
        np.zeros(len(lists), dtype=np.int64),
    )


def random_rows(seed: int, rows: int = 60, *, pairs: bool = False) -> Encoded:
    """Rows of 0 to 12 tokens between their special ones, an unknown token here and there."""
    rng = np.random.default_rng(seed)
    lists, types = [], []
    for _ in range(rows):
        one, two = (rng.integers(10, VOCABULARY, rng.integers(0, 13)).tolist() for _ in range(2))
        if len(one) > 3 and rng.random() < 0.3:
            one[1] = UNK
        lists.append([CLS, *one, SEP, *two, SEP] if pairs else [CLS, *one, SEP])
        types.append([0] * (len(one) + 2) + ([1] * (len(two) + 1) if pairs else []))
    return encoded(lists, types)


def rows_of(x: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(x.ids, x.offsets[1:-1])] if len(x) else []


def run(x: Encoded, n: int = 4, seed: int = 0, rates: Rates = HARD) -> Encoded:
    return traced(x, n, seed, rates)[0]


def traced(x: Encoded, n: int = 4, seed: int = 0, rates: Rates = HARD) -> tuple[Encoded, Origins]:
    return augment(x, n, seed=seed, special=SPECIAL, mask_id=MASK, neighbours=NEIGHBOURS, rates=rates)


def ordinary(row: list[int]) -> list[int]:
    return [t for t in row if t not in SPECIAL]


def subsequence(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(t in rest for t in short)


def test_without_operations_the_rows_are_repeated() -> None:
    rows = random_rows(0)
    made = run(rows, 3, rates=NONE)
    assert rows_of(made) == rows_of(rows) * 3
    assert made.type_ids.tolist() == rows.type_ids.tolist() * 3
    assert made.labels is None


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_what_holds_for_all_operations_at_once(seed: int, pairs: bool) -> None:
    rows = random_rows(seed, pairs=pairs)
    made = run(rows, 4, seed)
    assert len(made) == 4 * len(rows)
    assert made.ids.dtype == np.int32
    assert made.type_ids.dtype == np.int8
    assert made.offsets.dtype == np.int64
    assert made.offsets[-1] == len(made.ids) == len(made.type_ids)
    assert made.lengths.max() <= rows.lengths.max()
    kinds = [part.tolist() for part in np.split(made.type_ids, made.offsets[1:-1])]
    for before, after, kind in zip(rows_of(rows) * 4, rows_of(made), kinds, strict=True):
        assert after[0] == CLS
        assert after[-1] == SEP
        assert after.count(SEP) == before.count(SEP)
        assert (len(after) > after.count(SEP) + 1) == (len(before) > before.count(SEP) + 1)
        border = after.index(SEP) + 1
        assert kind == [0] * border + [1] * (len(after) - border)


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    rows = random_rows(0)
    assert np.array_equal(run(rows, seed=5).ids, run(rows, seed=5).ids)
    assert not np.array_equal(run(rows, seed=5).ids, run(rows, seed=6).ids)
    # The second version of a row is not the first one again.
    made = rows_of(run(rows))
    assert made[: len(rows)] != made[len(rows) : 2 * len(rows)]


@pytest.mark.parametrize("name", [field.name for field in fields(Rates)])
def test_every_operation_does_what_it_says_and_no_more(name: str) -> None:
    rows = random_rows(1, 200)
    made = rows_of(run(rows, 2, rates=replace(NONE, **{name: 0.8})))
    before = rows_of(rows) * 2
    changed = sum(a != b for a, b in zip(before, made, strict=True))
    assert changed > 100
    texts = [ordinary(row) for row in before]
    ends = {tuple(text[i:]) for text in texts for i in range(len(text))}
    for old, new in zip(before, made, strict=True):
        was, now = ordinary(old), ordinary(new)
        if name == "drop":
            assert subsequence(new, old)
        elif name == "window":
            # Every unbroken run keeps a run of its own tokens, at least a third of them.
            assert subsequence(new, old)
            assert 3 * len(now) >= len(was)
            if UNK not in old:
                at = next(i for i in range(len(was) - len(now) + 1) if was[i : i + len(now)] == now)
                assert at >= 0
        elif name == "mask":
            assert all(a == b or (b == MASK and a not in SPECIAL) for a, b in zip(old, new, strict=True))
        elif name == "replace":
            assert all(a == b or b in NEIGHBOURS[a] for a, b in zip(old, new, strict=True))
        elif name == "swap":
            assert sorted(new) == sorted(old)
            moved = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            assert moved[::2] == [i - 1 for i in moved[1::2]]
            assert all(new[i] == old[i + 1] and new[i + 1] == old[i] for i in moved[::2])
        elif name == "splice" and new != old:
            assert UNK not in old
            cuts = [
                i
                for i in range(len(now) + 1)
                if now[:i] == was[:i] and (i == len(now) or tuple(now[i:]) in ends)
            ]
            assert cuts
            assert max(cuts) >= 1


def test_the_share_of_changed_tokens_is_half_the_rate() -> None:
    rows = encoded([[CLS, *range(10, 30), SEP]] * 3000)
    share = np.mean(run(rows, 1, rates=replace(NONE, mask=0.4)).ids == MASK) * 22 / 20
    # A share drawn uniformly from [0, 0.4] has mean 0.2 and deviation 0.115; over 3,000 rows the error
    # of the mean is 0.0021 + a little for the tokens: four of them are 0.01.
    assert share == pytest.approx(0.2, abs=0.01)
    spread = (run(rows, 1, rates=replace(NONE, mask=0.4)).ids.reshape(3000, 22) == MASK).sum(1)
    assert spread.min() == 0
    assert spread.max() >= 9


def test_pairs_and_rows_with_unknown_tokens_are_not_spliced() -> None:
    pairs = random_rows(0, pairs=True)
    both = np.array([len(part) > 0 and min(map(len, _segments(part))) > 0 for part in rows_of(pairs)])
    made = rows_of(run(pairs, 1, rates=replace(NONE, splice=1.0)))
    assert [row for row, two in zip(made, both, strict=True) if two] == [
        row for row, two in zip(rows_of(pairs), both, strict=True) if two
    ]


def _segments(row: list[int]) -> list[list[int]]:
    border = row.index(SEP)
    return [row[1:border], row[border + 1 : -1]]


def test_without_mask_token_and_neighbours_nothing_new_appears() -> None:
    rows = random_rows(0)
    made, _ = augment(rows, 4, seed=0, special=SPECIAL, mask_id=None, neighbours=None, rates=HARD)
    assert set(made.ids.tolist()) <= set(rows.ids.tolist())


def test_no_rows_and_rows_without_text() -> None:
    assert len(run(encoded([]), 3)) == 0
    assert rows_of(run(encoded([[CLS, SEP], [CLS, UNK, SEP]]), 2)) == [[CLS, SEP], [CLS, UNK, SEP]] * 2


def test_rows_that_are_there_already_are_found() -> None:
    rows = encoded([[CLS, 10, SEP], [CLS, 11, 12, SEP], [CLS, SEP]])
    made = encoded([[CLS, 10, SEP], [CLS, 12, 11, SEP], [CLS, 12, 11, SEP], [CLS, 10, 10, SEP]])
    assert unlike(made, rows).tolist() == [1, 3]
    big = random_rows(3, 300)
    many = run(big, 6)
    seen = {tuple(row) for row in rows_of(big)}
    expected = []
    for i, row in enumerate(rows_of(many)):
        if tuple(row) not in seen:
            seen.add(tuple(row))
            expected.append(i)
    assert 0 < len(expected) < len(many)
    assert unlike(many, big).tolist() == expected
    assert len(unlike(concatenate(big, big, np.array([-100])), big)) == 0


@pytest.mark.parametrize("rates", [replace(HARD, splice=0.6, mask=0, replace=0), replace(NONE, splice=1)])
def test_every_text_knows_the_rows_it_was_made_from(rates: Rates) -> None:
    # Row i is spelt with tokens of its own, so the tokens of a text tell where it comes from.
    rows = encoded([[CLS, *range(10 + 5 * i, 15 + 5 * i), SEP] for i in range(30)])
    made, origins = traced(rows, 6, rates=rates)
    assert len(origins.first) == len(origins.second) == len(origins.share) == len(made)
    assert np.array_equal(origins.first, np.tile(np.arange(30), 6))
    for row, first, second, share in zip(
        rows_of(made), origins.first, origins.second, origins.share, strict=True
    ):
        owners = [(t - 10) // 5 for t in ordinary(row)]
        assert set(owners) <= {first, second}
        if first != second:
            assert share == pytest.approx(owners.count(first) / len(owners))  # one rounding of a quotient
    mixed = (origins.share > 0) & (origins.share < 1)
    assert mixed.any()
    assert (origins.share[origins.first == origins.second] <= 1).all()
    few = origins.take(np.flatnonzero(mixed)[:3])
    assert few.share.tolist() == origins.share[mixed][:3].tolist()


def test_a_text_without_a_second_row_is_wholly_of_its_first() -> None:
    rows = random_rows(2, pairs=True)  # pairs are not spliced
    _, origins = traced(rows)
    assert np.array_equal(origins.first, origins.second)
    assert set(origins.share) == {1.0}


def test_pairs_that_differ_in_segments_only_are_different() -> None:
    one = encoded([[CLS, 10, SEP, 11, SEP]], [[0, 0, 0, 1, 1]])
    two = encoded([[CLS, 10, SEP, 11, SEP]], [[0, 0, 0, 0, 0]])
    assert unlike(two, one).tolist() == [0]


def test_a_hundred_thousand_rows_take_seconds() -> None:
    rows = random_rows(0, 3000)
    begun = time.perf_counter()
    made = run(rows, 40)
    unlike(made, rows)
    # 0.12 s on the machine this was written on; the rest is room for a busy one.
    assert len(made) == 120_000
    assert time.perf_counter() - begun < 5
