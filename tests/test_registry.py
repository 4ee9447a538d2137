"""The folder is the registry; what every method in it must have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcli import registry, tasks
from kdcli.errors import UsageError
from kdcli.registry import MethodSpec
from kdcli.stages.lowrank.rule import ConvolutionRule, LinearRule
from kdcli.stages.prune.criterion import Criterion
from kdcli.stages.quantize.scheme import Scheme, WeightRounding
from kdcli.training.losses import response
from kdcli.training.terms import Loss

FOLDER = Path(registry.__file__).parent
ALL = [(folder, name) for folder in registry.FOLDERS for name in registry.names(folder)]


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(default=8, ge=1)
    ratio: float = 0.5
    centred: bool = True

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.samples == 13:
            raise ValueError("13 samples go with no ratio")
        return self


MADE_UP = MethodSpec(config=Config)
KINDS: dict[str, tuple[type[MethodSpec], ...]] = {
    "distill": (Loss,),
    "prune": (Criterion,),
    "lowrank": (LinearRule, ConvolutionRule),
    "quantize": (Scheme,),
    "rounding": (WeightRounding,),
    "smoothing": (MethodSpec,),
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry of its own, so that the tests do not depend on which methods exist."""
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").touch()
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    monkeypatch.setitem(registry.FOLDERS, "quantize", "quantize")
    registry.names.cache_clear()
    yield tmp_path
    registry.names.cache_clear()


def test_every_python_file_of_a_folder_is_a_method() -> None:
    assert ("distill", "response") in ALL
    for stage in registry.METHOD_STAGES:
        files = {p.stem for p in (FOLDER / registry.FOLDERS[stage]).glob("*.py")} - {"__init__"}
        assert {name.replace("-", "_") for name in registry.names(stage)} == files


def test_names_are_sorted_and_have_dashes(elsewhere: Path) -> None:
    for name in ("fp16", "dynamic_int8"):
        (elsewhere / "quantize" / f"{name}.py").write_text("raise RuntimeError\n", encoding="utf-8")
    assert registry.names("quantize") == ("dynamic-int8", "fp16")


def test_the_summary_is_read_without_running_the_file(elsewhere: Path) -> None:
    path = elsewhere / "quantize" / "dynamic_int8.py"
    path.write_text('"""Weights of 8 bits.\n\nMore.\n"""\nraise RuntimeError\n', encoding="utf-8")
    assert registry.summary("quantize", "dynamic-int8") == "Weights of 8 bits."
    path.write_text("raise RuntimeError\n", encoding="utf-8")
    assert registry.summary("quantize", "dynamic-int8") == ""


def test_load_gives_what_the_file_declares() -> None:
    assert registry.load("distill", "response", Loss) is response.METHOD
    with pytest.raises(
        TypeError, match=r"METHOD of kdcli\.training\.losses\.response is a Loss, not a Criterion"
    ):
        registry.load("distill", "response", Criterion)


@pytest.mark.parametrize(
    "find", [lambda stage, name: registry.load(stage, name, MethodSpec), registry.load_name]
)
def test_an_unknown_name_gets_a_suggestion(find: Callable[[str, str], object]) -> None:
    with pytest.raises(
        UsageError, match=r"unknown distill method 'responce': did you mean 'response'\? choose one of: "
    ):
        find("distill", "responce")


@pytest.mark.parametrize("name", ["../prune/taylor", "response.Config", "__init__", "", "Response"])
def test_only_listed_names_are_imported(name: str) -> None:
    with pytest.raises(UsageError, match="unknown distill method"):
        registry.load("distill", name, MethodSpec)


def test_settings_become_typed() -> None:
    found = MADE_UP.configured({"samples": "32", "ratio": "1e-2", "centred": "false"})
    assert (found.samples, found.ratio, found.centred) == (32, 0.01, False)
    assert MADE_UP.configured({}) == Config()


def test_an_unknown_setting_gets_a_suggestion() -> None:
    with pytest.raises(
        UsageError,
        match=r"^unknown setting 'sample': did you mean 'samples'\? choose one of: centred, ratio, samples$",
    ):
        MADE_UP.configured({"sample": "3"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": "0"}, "--set samples=0: input should be greater than or equal to 1"),
        ({"ratio": "half"}, "--set ratio=half: input should be a valid number"),
        ({"samples": "13", "ratio": "2"}, "--set samples=13 --set ratio=2: 13 samples go with no ratio"),
    ],
)
def test_a_refused_value_is_one_line_that_shows_it(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        MADE_UP.configured(settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(message)


def test_listing_methods_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kdcli import registry;"
        "[registry.summary(f, n) for f in registry.FOLDERS for n in registry.names(f)];"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'onnx', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("stage", "name"), ALL)
class TestContract:
    """What holds for every method, those of tomorrow included."""

    def test_its_docstring_names_the_source(self, stage: str, name: str) -> None:
        text = registry.text(stage, name)
        summary, blank, *rest = text.splitlines()
        assert summary == registry.summary(stage, name)
        assert 20 <= len(summary) <= 110
        assert blank == ""
        for part in ("Source", "Differs:"):
            assert any(line.startswith(part) or f" {part}" in line for line in rest), f"no '{part}'"

    def test_it_declares_what_it_is(self, stage: str, name: str) -> None:
        method = registry.load(stage, name, MethodSpec)
        assert isinstance(method, KINDS[stage])
        assert method.answers
        # Whoever refuses an answer says why.
        assert bool(method.because) == (set(method.answers) != set(registry.ANSWERS))

    def test_its_config_has_defaults_and_refuses_what_it_does_not_know(self, stage: str, name: str) -> None:
        config = registry.load(stage, name, MethodSpec).config
        config()
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            config(no_such_setting=1)

    def test_its_settings_are_explained_and_frozen(self, stage: str, name: str) -> None:
        config = registry.load(stage, name, MethodSpec).config
        assert config.model_config.get("frozen") is True
        assert [key for key, field in config.model_fields.items() if not field.description] == []

    def test_it_has_a_test_file(self, stage: str, name: str) -> None:
        assert (
            Path(__file__).parent / registry.FOLDERS[stage] / f"test_{name.replace('-', '_')}.py"
        ).is_file()


class Wide(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ratio: float = 0.5
    patience: int = 1


def test_a_key_goes_to_all_that_have_it_and_a_named_one_to_one() -> None:
    methods = {"a": MADE_UP, "b": MethodSpec(config=Wide)}
    given = {"ratio": "1", "b.ratio": "2", "samples": "3", "patience": "4"}
    for order in (given, dict(reversed(given.items()))):
        assert registry.share_out("distill", order, methods) == (
            {},
            {"a": {"ratio": "1", "samples": "3"}, "b": {"ratio": "2", "patience": "4"}},
        )


def test_the_stage_takes_a_plain_key_before_any_method() -> None:
    own, rest = registry.share_out("distill", {"ratio": "1", "a.ratio": "2"}, {"a": MADE_UP}, Wide)
    assert (own, rest) == ({"ratio": "1"}, {"a": {"ratio": "2"}})


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        (
            "rati",
            "unknown setting 'rati': did you mean 'ratio'? choose one of: centred, ratio, samples",
            None,
        ),
        (
            "distance_weight",
            "unknown setting 'distance_weight': choose one of",
            "distance_weight is a setting of rkd",
        ),
        (
            "rkd.distance_weight",
            "unknown setting 'rkd.distance_weight'",
            "rkd is not among the chosen methods: a",
        ),
        ("a.patience", "unknown setting 'a.patience'", None),
    ],
)
def test_a_key_that_nobody_takes_says_who_would(key: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        registry.share_out("distill", {key: "1"}, {"a": MADE_UP})
    assert str(caught.value).startswith(message)
    assert caught.value.hint == hint


def test_answers_that_a_method_cannot_compare_are_refused_with_the_reason() -> None:
    methods = {"response": response.METHOD, "dkd": registry.load("distill", "dkd", Loss)}
    registry.need_answers(methods, tasks.get("text-classification"))
    registry.need_answers({"response": response.METHOD}, tasks.get("regression"))
    with pytest.raises(
        UsageError,
        match=r"^method 'dkd' is for answers that are one of several labels, and those of the task multi-label are "
        r"any of several labels: DKD splits the target class from the others",
    ) as caught:
        registry.need_answers(methods, tasks.get("multi-label"))
    assert caught.value.hint == "use --method response or --method logit-mse"
    assert caught.value.exit_code == 2
