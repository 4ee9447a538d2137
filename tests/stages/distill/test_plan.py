"""What a distillation is asked for is sorted and checked before any model is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kdcli import processes, tasks
from kdcli.errors import UsageError
from kdcli.request import Common, Request
from kdcli.stages.distill.options import STRATEGIES, DistillOptions
from kdcli.stages.distill.plan import (
    ALPHA,
    DistillPlan,
    DistillSettings,
    assistants,
    check,
    need_task,
    teacher_epochs,
    teacher_weights,
)
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.multi_label import MultiLabel
from kdcli.tasks.regression import Regression
from kdcli.training.losses import dkd, rkd


def plan(settings: dict[str, str] | None = None, teachers: int = 1, **options: Any) -> DistillPlan:
    given = {"student": "tiny"} | options
    return check(
        Request(
            stage="distill",
            model=None,
            options=DistillOptions(teachers=("no-such-model",) * teachers, **given),
            common=Common(settings=settings or {}),
            argv=("kdcli", "distill"),
        )
    )


def configs(found: DistillPlan) -> dict[str, Any]:
    return {one.name: one.config for one in found.chosen}


def test_defaults() -> None:
    found = plan()
    assert [(one.name, one.weight) for one in found.chosen] == [("response", ALPHA)]
    assert found.hard_weight == 1 - ALPHA
    assert found.settings == DistillSettings()


def test_weights_and_order_are_those_that_were_asked_for() -> None:
    found = plan(
        methods=("rkd", "response", "hidden"), alpha=0.9, beta=3.0, weights={"rkd": 0.5}, temperature=4.0
    )
    assert [(one.name, one.weight) for one in found.chosen] == [
        ("rkd", 0.5),
        ("response", 0.9),
        ("hidden", 3.0),
    ]
    assert found.hard_weight == pytest.approx(0.1)
    assert configs(found)["response"].temperature == 4.0


@pytest.mark.parametrize("how", ["option", "setting"])
def test_a_plain_key_goes_to_every_method_that_has_it(how: str) -> None:
    methods = ("response", "dkd", "rkd")  # rkd has no temperature
    given: dict[str, Any] = {"temperature": 3.0} if how == "option" else {"settings": {"temperature": "3"}}
    found = configs(plan(methods=methods, **given))
    assert (found["response"].temperature, found["dkd"].temperature) == (3.0, 3.0)
    assert found["rkd"] == rkd.Config()


def test_a_methods_own_key_goes_to_it_alone() -> None:
    found = configs(plan({"rkd.distance_weight": "3"}, methods=("response", "rkd", "similarity")))
    assert found["rkd"] == rkd.Config(distance_weight=3.0)
    assert rkd.Config().distance_weight != 3.0
    # A key that two methods have: `on` of rkd, and `on` of similarity.
    found = configs(plan({"rkd.on": "logits"}, methods=("rkd", "similarity")))
    assert (found["rkd"].on, found["similarity"].on) == ("logits", "pooled")


@pytest.mark.parametrize("first", ["temperature", "dkd.temperature"])
def test_a_methods_own_key_wins_over_a_plain_one_in_any_order(first: str) -> None:
    given = {"temperature": "3", "dkd.temperature": "7"}
    settings = {first: given[first], **given}
    assert next(iter(settings)) == first
    found = configs(plan(settings, methods=("response", "dkd")))
    assert (found["response"].temperature, found["dkd"].temperature) == (3.0, 7.0)
    found = configs(plan({"dkd.temperature": "7"}, methods=("response", "dkd"), temperature=3.0))
    assert (found["response"].temperature, found["dkd"].temperature) == (3.0, 7.0)


def test_the_distillations_own_settings_are_no_methods() -> None:
    given = {"patience": "4", "dropout": "0.2", "adversarial.warmup": "0.5", "warmup": "0.3"}
    found = plan(given, methods=("response", "adversarial"))
    assert (found.settings.patience, found.settings.dropout, found.settings.warmup) == (4, 0.2, 0.3)
    assert configs(found)["adversarial"].warmup == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": {"temperatur": "3"}}, "unknown setting 'temperatur': did you mean 'temperature'"),
        ({"settings": {"teacher_epoch": "3"}}, "did you mean 'teacher_epochs'"),
        # Known, but of a method that was not chosen, or that has no such key.
        ({"settings": {"distance_weight": "3"}}, "unknown setting 'distance_weight'"),
        ({"settings": {"rkd.distance_weight": "3"}}, r"unknown setting 'rkd\.distance_weight'"),
        ({"settings": {"response.distance_weight": "3"}, "methods": ("response", "rkd")}, "unknown setting"),
        ({"settings": {"response.patience": "3"}}, "unknown setting"),
        ({"settings": {"temperature": "-1"}}, "temperature=-1: input should be greater than 0"),
        ({"settings": {"temperature": "warm"}}, "temperature=warm"),
        ({"settings": {"peers": "1"}, "strategy": "online"}, "peers=1"),
        ({"settings": {"phases": "three"}}, "phases=three"),
        ({"temperature": 2.0, "methods": ("hidden",)}, "--temperature belongs to none of the methods hidden"),
        ({"weights": {"rkd": 1.0}}, "--weight rkd belongs to no chosen method; chosen: response"),
        ({"weights": {"response": 1.0}}, "the weight of 'response' is --alpha"),
        ({"beta": 1.0}, "--beta weighs feature methods, and none was chosen"),
        ({"gamma": 1.0, "methods": ("response", "hidden")}, "--gamma weighs relation methods"),
        ({"alpha": 0.5, "methods": ("hidden",)}, "--alpha weighs response methods, and none was chosen"),
        ({"alpha": 1.01}, r"alpha: '1\.01' must be at least 0 and at most 1"),
        ({"alpha": float("nan")}, "alpha: 'nan' must be at least 0"),
        ({"methods": ("response", "rkd", "response")}, "a method is given twice: response, rkd, response"),
        ({"methods": ("respons",)}, "unknown distill method 'respons': did you mean 'response'"),
        ({"strategy": "online", "augment": 2}, "labels no extra texts"),
        ({"layer_map": "uniforn"}, "unknown layer map 'uniforn': did you mean 'uniform'"),
        ({"layer_map": "1:2,1:3"}, "student layer 1 is given twice"),
        ({"layer_map": "0:1"}, "'0:1' is not a pair student:teacher"),
        ({"strategy": "layer-wise"}, "unknown strategy 'layer-wise': did you mean 'layerwise'"),
        ({"init": "teachers"}, "unknown init 'teachers': did you mean 'teacher'"),
        ({"student": "0x16"}, "out of range"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(options.pop("settings", None), **options)


def test_alpha_at_its_ends() -> None:
    for alpha in (0.0, 1.0):
        found = plan(alpha=alpha)
        assert (found.hard_weight, found.chosen[0].weight) == (1 - alpha, alpha)


def test_without_a_response_method_the_labels_have_all_the_weight() -> None:
    found = plan(methods=("hidden", "rkd"))
    assert found.hard_weight == 1.0
    assert {one.name: one.weight for one in found.chosen} == {"hidden": 0.01, "rkd": 1.0}
    assert configs(plan(methods=("dkd",)))["dkd"] == dkd.Config()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_strategy_can_do(strategy: str) -> None:
    answers_only = strategy in ("online", "layerwise")
    assert plan(strategy=strategy).options.strategy == strategy
    for options, words in (
        ({"methods": ("response", "hidden")}, "compares answers only"),
        ({"methods": ("dkd",)}, "compares answers only"),
        ({"teachers": 2}, "has one teacher"),
        ({"control": True}, "has no --control"),
    ):
        given: dict[str, Any] = {"strategy": strategy, **options}
        if answers_only:
            with pytest.raises(UsageError, match=words):
                plan(**given)
        else:
            plan(**given)


def test_assistants_are_checked_before_any_work() -> None:
    assert assistants(DistillSettings()) == ["mini"]
    assert assistants(DistillSettings(assistants=" small, mini,3x96,")) == ["small", "mini", "3x96"]
    for names, words in ((",", "names no assistant"), ("mini,0x16", "out of range")):
        with pytest.raises(UsageError, match=words):
            plan({"assistants": names}, strategy="assistant-chain")


def test_the_adversary_trains_in_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("response", "adversarial")
    plan(methods=methods)
    monkeypatch.setattr(processes, "count", lambda: 2)
    plan()
    with pytest.raises(UsageError, match="one process only"):
        plan(methods=methods)


@pytest.mark.parametrize(
    ("given", "teachers", "expected"),
    [
        (None, 1, [1.0]),
        (None, 4, [0.25] * 4),
        ("3", 1, [1.0]),
        ("0.7,0.3", 2, [0.7, 0.3]),
        ("1, 3", 2, [0.25, 0.75]),
        ("2,2,4", 3, [0.25, 0.25, 0.5]),
    ],
)
def test_teacher_weights_sum_to_one(given: str | None, teachers: int, expected: list[float]) -> None:
    assert teacher_weights(DistillSettings(teacher_weights=given), teachers) == pytest.approx(expected)


@pytest.mark.parametrize("given", ["1", "1,2,3", "1,0", "1,-1", "1,x", "", ",", "nan,1", "1,nan", "inf,1"])
def test_teacher_weights_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match="2 positive numbers are needed"):
        plan({"teacher_weights": given}, teachers=2)


def test_a_method_that_cannot_compare_the_tasks_answers_is_refused_before_any_training() -> None:
    checked = plan(methods=("response", "dkd"))
    need_task(replace(checked, chosen=checked.chosen[:1]), tasks.get("multi-label"))
    need_task(checked, tasks.get("text-classification"))
    with pytest.raises(UsageError, match="method 'dkd' is for answers that are one of several labels"):
        need_task(checked, tasks.get("multi-label"))


def test_a_teacher_learns_for_as_long_as_its_task_takes() -> None:
    """Epochs of 32 rows a step; the data sets are CLINC150, SST-2, GoEmotions and STS-B by their sizes."""
    found = [
        teacher_epochs(CLASSIFICATION, 15_250, 151, 32),
        teacher_epochs(CLASSIFICATION, 6_920, 2, 32),
        teacher_epochs(MultiLabel(), 43_410, 28, 32),
        teacher_epochs(Regression(), 5_749, 1, 32),
    ]
    assert found == [4, 1, 2, 4]
    assert teacher_epochs(Regression(), 100, 1, 32) == 10
    assert teacher_epochs(Regression(), 10**6, 1, 32) == 1
