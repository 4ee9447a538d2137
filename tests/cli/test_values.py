"""What may be typed, and what it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.cli import values
from kdcli.data import sources
from kdcli.errors import InputError


def test_real_keeps_its_range_and_refuses_nan_and_infinity() -> None:
    parse = values.real(0, 1, above=True)
    assert parse("1") == 1.0
    assert parse("1e-3") == 0.001
    for given in ("0", "-1", "1.01", "nan", "inf", "-inf", "", "half"):
        with pytest.raises(ValueError, match=given or "not a number"):
            parse(given)
    assert values.real(0, 1, below=True)("0") == 0.0
    with pytest.raises(ValueError, match="below 1"):
        values.real(0, 1, below=True)("1")
    with pytest.raises(ValueError, match="at least 0"):
        values.real(0)("inf")


def test_whole_keeps_its_range() -> None:
    parse = values.whole(1, 9)
    assert (parse("1"), parse("9")) == (1, 9)
    for given in ("0", "10", "1.5", "x", ""):
        with pytest.raises(ValueError, match=r"whole number|at least 1"):
            parse(given)


def test_a_rank_is_a_number_or_has_a_name() -> None:
    assert [values.rank(given) for given in ("1", "64", "evbmf")] == ["1", "64", "evbmf"]
    for given in ("evbf", "1.5", ""):
        with pytest.raises(ValueError, match=f"'{given}' is neither a whole number nor evbmf"):
            values.rank(given)
    with pytest.raises(ValueError, match="at least 1"):
        values.rank("0")


@pytest.mark.parametrize("given", ["auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"])
def test_devices(given: str) -> None:
    assert values.device(given) == given


@pytest.mark.parametrize("given", ["gpu", "cuda:", "cuda:x", "cpu:0", "CPU", ""])
def test_no_devices(given: str) -> None:
    with pytest.raises(ValueError, match="unknown device"):
        values.device(given)


def test_models_are_checked_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for given in ("-", "minilm", "mine", "./later", "org/name", "org/name@main"):
        assert values.model(given) == given
    with pytest.raises(InputError, match="did you mean 'bert-base'"):
        values.model("bert-bsae")
    with pytest.raises(InputError):
        values.model("")


def test_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    for given in ("tiny", "medium", "3x192", "static", "cnn-64", "own", "out/student", "minilm"):
        assert values.student(given) == given
    with pytest.raises(ValueError, match="did you mean 'small'"):
        values.student("smal")


def test_pairs_keep_the_last_of_a_key_and_equal_signs_in_values() -> None:
    given = [values.pair(text) for text in ("a=1", "b = x=y", "a=2", "c=")]
    assert values.pairs(given) == {"a": "2", "b": "x=y", "c": ""}
    assert values.pairs(None) == {}
    for wrong in ("a", "=1", " =1"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            values.pair(wrong)


def test_weights_are_numbers_of_at_least_0() -> None:
    assert values.weight("crd=0.5") == "crd=0.5"
    for wrong in ("crd=-0.1", "crd=nan", "crd=x", "crd"):
        with pytest.raises(ValueError, match="'"):
            values.weight(wrong)


def test_completion_of_data_offers_every_alias() -> None:
    assert set(values.data_aliases()) == set(sources.ALIASES)


def test_offered_names_begin_as_typed() -> None:
    complete = values.offer(lambda: ("cpu", "cuda", "mps"))
    assert complete("c") == ["cpu", "cuda"]
    assert complete("") == ["cpu", "cuda", "mps"]
    assert complete("x") == []


def test_structures_are_names_or_n_of_m() -> None:
    for given in ("weights", "2:4", "1:4", "3:8"):
        assert values.structure(given) == given
    for given in ("n:m", "2:", "2:4:8", "-1:4"):
        with pytest.raises(ValueError, match=r"unknown structure .*choose one of: .*2:4"):
            values.structure(given)


def test_a_sum_of_structures_is_put_in_order() -> None:
    assert values.structure("neurons+layers+heads") == "layers+heads+neurons"
    assert values.structure("vocab") == "vocab"
    with pytest.raises(ValueError, match="did you mean 'layers'"):
        values.structure("layer+heads")
    with pytest.raises(ValueError, match="unknown structure 'weights'"):
        values.structure("weights+heads")
