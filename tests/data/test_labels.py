from __future__ import annotations

import pytest

from kdcli.data.labels import align, ordered, suggest
from kdcli.errors import InputError
from kdcli.names import printable


def test_align_goes_by_name_not_by_position() -> None:
    assert align(["negative", "positive"], ["positive", "neutral", "negative"]) == {
        "negative": 2,
        "positive": 0,
    }


def test_align_prefers_the_exact_case() -> None:
    assert align(["a", "A"], ["A", "a"]) == {"a": 1, "A": 0}


def test_align_ignores_case_where_that_is_unique() -> None:
    assert align(["Negative", "POSITIVE"], ["negative", "positive"]) == {"Negative": 0, "POSITIVE": 1}
    with pytest.raises(InputError, match="does not know these labels of the data: AB"):
        align(["AB"], ["ab", "Ab"])


def test_unknown_label_names_both_sides_and_the_likeliest() -> None:
    with pytest.raises(InputError, match=r"of the data: positiv; .* does not use: positive") as caught:
        align(["negative", "positiv"], ["negative", "positive"])
    assert caught.value.hint is not None
    assert "did you mean 'positive'" in caught.value.hint


def test_two_spellings_of_one_label_are_refused() -> None:
    with pytest.raises(InputError, match="positive, Positive mean the same label"):
        align(["positive", "Positive", "negative"], ["negative", "positive"])


def test_a_label_the_model_has_twice_is_refused() -> None:
    with pytest.raises(InputError, match="label 'a' twice"):
        align(["a"], ["a", "a", "b"])


@pytest.mark.parametrize("names", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_generic_model_labels_take_numbers(names: list[str]) -> None:
    assert align(names, ["LABEL_0", "LABEL_1", "LABEL_2"]) == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize("names", [["negative", "positive"], ["1", "2"], ["0"], ["0", "1", "2"]])
def test_generic_model_labels_take_nothing_else(names: list[str]) -> None:
    with pytest.raises(InputError, match="have no names") as caught:
        align(names, ["LABEL_0", "LABEL_1"])
    assert "id2label" in str(caught.value.hint)


def test_truth_values_are_zero_and_one_for_a_model_without_names() -> None:
    assert align(["false", "true"], ["LABEL_0", "LABEL_1"]) == {"false": 0, "true": 1}
    with pytest.raises(InputError, match="have no names"):
        align(["1", "true"], ["LABEL_0", "LABEL_1"])


def test_a_number_meets_its_other_spelling() -> None:
    assert align(["0", "1"], ["1.0", "0.0"]) == {"0": 1, "1": 0}
    assert align(["1"], ["1.0", "1"]) == {"1": 1}


def test_numbers_against_names_are_refused_with_the_way_to_go_on() -> None:
    with pytest.raises(
        InputError, match=r"labels of the data are numbers \(0, 1\), .* names \(bad, good, so-so\)"
    ) as caught:
        align(["0", "1"], ["bad", "good", "so-so"], option="text=s,label=l:ids")
    assert "(0 is bad, 1 is good)" in str(caught.value.hint)
    assert str(caught.value.hint).endswith("--columns text=s,label=l:ids")
    with pytest.raises(InputError, match="are numbers") as caught:
        align(["1", "2", "3"], ["bad", "so-so", "good"])  # counted from 1: no ids
    assert "these numbers are no ids of the model's 3 labels, which are 0 to 2" in str(caught.value.hint)
    with pytest.raises(InputError, match="have no names") as caught:
        align(["1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"])  # two of three: which ones?
    assert "--columns label=label:ids" in str(caught.value.hint)
    with pytest.raises(InputError, match="does not know these labels of the data: 0, good"):
        align(["0", "good"], ["bad", "so-so"])


def test_ids_go_by_position_whatever_the_names() -> None:
    assert align(["1", "0"], ["good", "bad"], ids=True) == {"1": 1, "0": 0}
    assert align(["1"], ["1", "0"], ids=True) == {"1": 1}
    assert align(["2"], ["LABEL_0", "LABEL_1", "LABEL_2"], ids=True) == {"2": 2}
    for name in ("2", "-1", "good"):
        with pytest.raises(InputError, match="is not an id of the model, whose 2 labels have the ids 0 to 1"):
            align(["0", name], ["a", "b"], ids=True)


def test_numbers_sort_as_numbers() -> None:
    assert ordered(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert ordered(["10", "9", "b"]) == ["10", "9", "b"]


def test_messages_are_safe_and_short() -> None:
    assert "\x1b" not in printable("\x1b[31mred")
    assert len(printable("x" * 500)) == 60
    text = suggest("label_077x", [f"label_{i:03}" for i in range(150)])
    assert text.startswith("did you mean 'label_077'?")
    assert text.endswith("and 138 more")
