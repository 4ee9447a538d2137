"""Layer maps: the maps of the literature, and what is refused."""

from __future__ import annotations

import pytest

from kdcli.errors import UsageError
from kdcli.training import layer_map
from kdcli.training.layer_map import NAMES, parse, resolve


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        (4, 12, [3, 6, 9, 12]),  # TinyBERT with 4 layers: g(m) = 3 m
        (6, 12, [2, 4, 6, 8, 10, 12]),  # with 6 layers: g(m) = 2 m
        (3, 12, [4, 8, 12]),
        (4, 10, [3, 5, 8, 10]),  # 2.5 and 7.5 both go up; round() would give 2 and 8
        (5, 12, [2, 5, 7, 10, 12]),
        (1, 12, [12]),
        (12, 4, [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]),
    ],
)
def test_uniform(student: int, teacher: int, layers: list[int]) -> None:
    pairs = resolve("uniform", student, teacher)
    assert pairs == list(zip(range(1, student + 1), layers, strict=True))
    assert resolve(None, student, teacher) == pairs


def test_the_other_names() -> None:
    assert resolve("last", 4, 12) == [(4, 12)]
    assert resolve("bottom", 3, 12) == [(1, 1), (2, 2), (3, 3)]
    assert resolve("top", 3, 12) == [(1, 10), (2, 11), (3, 12)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (2, 2), (3, 7), (5, 12), (12, 24), (11, 12)])
def test_every_map_stays_within_both_models_and_keeps_the_order(
    name: str, student: int, teacher: int
) -> None:
    pairs = resolve(name, student, teacher)
    mine, theirs = [m for m, _ in pairs], [n for _, n in pairs]
    assert mine == sorted(set(mine))
    # A student that is not deeper never follows one teacher layer twice.
    assert theirs == sorted(set(theirs))
    assert mine[0] >= 1
    assert theirs[0] >= 1
    assert mine[-1] <= student
    assert theirs[-1] <= teacher
    assert (pairs[-1] == (student, teacher)) is (name != "bottom" or student == teacher)


def test_equal_depths_are_the_identity() -> None:
    assert resolve("uniform", 6, 6) == resolve("top", 6, 6) == resolve("bottom", 6, 6)


def test_pairs_by_hand() -> None:
    assert parse("2:4, 1:2") == [(1, 2), (2, 4)]
    assert resolve("2:4,1:2", 2, 4) == [(1, 2), (2, 4)]
    assert resolve("3:3,1:3", 3, 3) == [(1, 3), (3, 3)]  # two layers may follow the same teacher layer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "unknown layer map 'unifrom': did you mean 'uniform'? choose one of: bottom, last, top"),
        ("", "unknown layer map ''"),
        ("Last", "unknown layer map 'Last': did you mean 'last'?"),
        ("3", "unknown layer map '3'"),
        ("0:1", "'0:1' is not a pair student:teacher of layers counted from 1"),
        ("1:2,2:00", "'2:00' is not a pair"),
        ("1:2,", "'' is not a pair"),
        ("1:2:3", "'1:2:3' is not a pair"),
        ("-1:2", "'-1:2' is not a pair"),
        ("1:2.5", "'1:2.5' is not a pair"),
        ("1:" + "9" * 50, "is not a pair"),
        ("1:2,1:3", "student layer 1 is given twice"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused_before_the_models_are_known(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert message in str(caught.value)
    with pytest.raises(UsageError):
        resolve(spec, 2, 4)


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "message"),
    [
        ("1:2,5:4", 4, 12, "no student layer 5; choose from 1 to 4"),
        ("1:2,2:13", 4, 12, "no teacher layer 13; choose from 1 to 12"),
        ("bottom", 6, 4, "'bottom' needs a teacher at least as deep"),
        ("top", 6, 4, "6 student layers, 4 teacher layers"),
        ("uniform", 0, 4, "the student has none"),
        (None, 4, 0, "the teacher has none"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    spec: str | None, student: int, teacher: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(spec, student, teacher)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_without_layers_are_told_what_works_for_them() -> None:
    with pytest.raises(UsageError, match=r"^pkd compares .* student has none: use response methods, pooled"):
        layer_map.need_layers("pkd", 0, 12)
    layer_map.need_layers("pkd", 1, 1)
