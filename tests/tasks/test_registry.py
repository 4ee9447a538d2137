"""Tasks by name, and the task that a configuration stands for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig

from kdcli import tasks
from kdcli.errors import InputError, UsageError
from kdcli.tasks.multi_label import MultiLabel
from kdcli.tasks.regression import Regression

HEAD = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_is_a_frozen_dataclass_with_its_own_name_and_a_summary(name: str) -> None:
    task = tasks.get(name)
    assert is_dataclass(task)
    assert task.name == name
    assert task.primary in task.metrics
    assert tasks.get(name, task.metrics[-1]).primary == task.metrics[-1]
    assert tasks._PROBLEMS[task.problem_type] == name
    assert tasks.summary(name).endswith(".")


def test_an_unknown_task_and_a_metric_of_another_one_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown task 'multilabel': did you mean 'multi-label'"):
        tasks.get("multilabel")
    with pytest.raises(UsageError, match="did you mean 'spearman'"):
        tasks.get("regression", "spearmann")
    with pytest.raises(UsageError, match="multi-label has no metric 'spearman'"):
        tasks.get("multi-label", "spearman")


def test_names_and_summaries_import_no_task() -> None:
    code = (
        "import sys; from kdcli import tasks; tasks.names(); tasks.summary('regression'); "
        "tasks.of_config({'problem_type': 'regression'}); "
        "print([m for m in ('torch', 'sklearn', 'scipy', 'numpy', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"problem_type": "multi_label_classification"}, "multi-label"),
        ({"problem_type": "regression", "id2label": {"0": "LABEL_0"}}, "regression"),
        ({"problem_type": "single_label_classification", **HEAD}, "text-classification"),
        (HEAD, "text-classification"),
        ({**HEAD, "id2label": {"0": "a", "1": "b"}}, "text-classification"),
        ({**HEAD, "id2label": {"0": "LABEL_0"}}, "regression"),  # a cross-encoder
        ({**HEAD, "num_labels": 1, "sentence_transformers": {"activation_fn": "x.Sigmoid"}}, "regression"),
        ({"num_labels": 1}, "regression"),
        (
            {**HEAD, "num_labels": 3, "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}},
            "multi-label",
        ),
        ({**HEAD, "function_to_apply": "sigmoid"}, "multi-label"),
        ({**HEAD, "function_to_apply": "softmax"}, "text-classification"),
        ({**HEAD, "multi_label": True}, "multi-label"),
        # What is said counts before what is guessed.
        ({**HEAD, "multi_label": True, "problem_type": "single_label_classification"}, "text-classification"),
        ({"architectures": ["BertModel"]}, None),
        ({"architectures": ["BertForMaskedLM"], "num_labels": 1}, None),
        ({"architectures": ["BertForTokenClassification"], "num_labels": 9}, None),
        ({}, None),
    ],
)
def test_the_task_of_a_configuration(config: dict[str, Any], expected: str | None) -> None:
    assert tasks.of_config(config) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"problem_type": "single_label_classification", "num_labels": 1}, "there is one output"),
        ({"problem_type": "regression", "id2label": {"0": "a", "1": "b"}}, "2 outputs"),
        ({"problem_type": "ranking"}, "'ranking' in model/config.json is unknown"),
        ({"problem_type": ["regression"]}, "is unknown to kdcli"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tasks.of_config(config, "model/config.json")


def test_sources_that_contradict_each_other_are_both_named() -> None:
    said = {"the teacher": None, "config.json of out": "regression", "the data d.csv": "regression"}
    assert tasks.agreed(said) == "regression"
    assert tasks.agreed({"the teacher": None}) is None
    with pytest.raises(
        InputError, match=r"config.json of out is for regression, but the data d.csv is for multi-label"
    ):
        tasks.agreed({**said, "the data d.csv": "multi-label"})
    with pytest.raises(InputError, match=r"--task regression is for regression, but the model 'x'") as caught:
        tasks.agreed({"--task regression": "regression", "the model 'x'": "multi-label"})
    assert str(caught.value.hint).startswith("leave it out; or, if the model was trained for regression: ")


@pytest.mark.parametrize(
    "task",
    [
        MultiLabel("macro_f1", (0.25, 0.1 + 0.2, 0.7)),
        MultiLabel(),
        Regression("rmse"),
        Regression(),
    ],
)
def test_a_configuration_that_transformers_saves_and_loads_gives_the_same_task(
    task: MultiLabel | Regression, tmp_path: Path
) -> None:
    labels = 3 if isinstance(task, MultiLabel) else 1
    config = BertConfig(num_labels=labels, architectures=HEAD["architectures"], **task.config_fields())
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert tasks.recorded(loaded.to_dict()) == task
    assert loaded.problem_type == task.problem_type


def test_a_metric_that_is_asked_for_wins_over_the_recorded_one() -> None:
    config = {
        "problem_type": "multi_label_classification",
        "kdcli_metric": "macro_f1",
        "kdcli_thresholds": [0.25],
    }
    assert tasks.recorded(config, metric="average_precision") == MultiLabel("average_precision", (0.25,))
    assert tasks.recorded({}) is None


@pytest.mark.parametrize("given", [[0.5], [0.5, 1.0], [0.5, "a"], 0.5, [0.5, float("nan")], [True, 0.5]])
def test_stored_thresholds_that_cannot_be_some_are_refused(given: object) -> None:
    config = {"problem_type": "multi_label_classification", "num_labels": 2, "kdcli_thresholds": given}
    with pytest.raises(InputError, match="kdcli_thresholds in m must be 2, one for every label"):
        tasks.recorded(config, "m")


def test_a_stored_metric_that_there_is_not_is_an_input_error() -> None:
    with pytest.raises(InputError, match="kdcli_metric in m: regression has no metric 'accuracy'"):
        tasks.recorded({"problem_type": "regression", "kdcli_metric": "accuracy"}, "m")
