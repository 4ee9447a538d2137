"""Tasks by name, and which one a model's configuration stands for; no task is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.docstrings import first_line_of
from kdcli.errors import InputError, UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.tasks.classification import Classification
    from kdcli.tasks.multi_label import MultiLabel
    from kdcli.tasks.regression import Regression
    from kdcli.tasks.task import Kind, Task

    # mypy holds every task to the contract here: the registry itself finds them by name.
    _KEPT: tuple[Task, ...] = (Classification(), MultiLabel(), Regression())

_CLASSES = {
    "text-classification": ("classification", "Classification"),
    "multi-label": ("multi_label", "MultiLabel"),
    "regression": ("regression", "Regression"),
}
"""Name -> file in this folder, and the class in it."""

_PROBLEMS = {
    "single_label_classification": "text-classification",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}
"""problem_type of transformers -> name."""

METRIC, THRESHOLDS = "kdcli_metric", "kdcli_thresholds"
"""Keys of config.json that kdcli adds to ``problem_type``; transformers keeps what it does not know."""

CROSS_ENCODER = "sentence_transformers"
"""Key of config.json under which sentence-transformers keeps what it applies to a cross-encoder's output; kdcli writes
it, so that ``CrossEncoder`` gives the numbers that were judged."""

KEYS = frozenset({METRIC, THRESHOLDS})


def names() -> tuple[str, ...]:
    """Names of all tasks, in the order of the documentation."""
    return tuple(_CLASSES)


def get(name: str, metric: str | None = None) -> Task:
    """Make a task.

    Args:
        name: As ``--task`` has it.
        metric: The primary metric, as ``--metric`` has it; None: the task's own.

    Raises:
        UsageError: There is no such task, or it has no such metric.
    """
    _check(name)
    file, class_name = _CLASSES[name]
    made: Any = vars(importlib.import_module(f"kdcli.tasks.{file}"))[class_name]()
    return judged_by(made, metric)


def of_kind(kind: Kind, metric: str | None = None) -> Task:
    """The task whose answers are of this kind, where nothing but the data says which one it is."""
    by_kind: dict[Kind, str] = {
        "one-of": "text-classification",
        "any-of": "multi-label",
        "number": "regression",
    }
    return get(by_kind[kind], metric)


def kind_of(name: str) -> Kind:
    """What an answer of a task is; raises as :func:`get` does."""
    return get(name).kind


def judged_by(task: Task, metric: str | None) -> Task:
    """The same task with another primary metric; None leaves it as it is.

    Raises:
        UsageError: The task has no metric of that name.
    """
    from dataclasses import replace

    if metric is None:
        return task
    if metric not in task.metrics:
        raise UsageError(f"{task.name} has no metric '{metric}': {did_you_mean(metric, task.metrics)}")
    changed: Task = replace(task, primary=metric)  # type: ignore[type-var]
    return changed


def summary(name: str) -> str:
    """First line of a task's docstring, read without importing it; raises as :func:`get` does."""
    _check(name)
    return first_line_of(Path(__file__).parent / f"{_CLASSES[name][0]}.py")


def of_config(config: Mapping[str, Any], where: str = "config.json") -> str | None:
    """Name of the task that a transformers configuration stands for; None where it says nothing of one.

    ``problem_type`` counts first: transformers reads it, and kdcli writes it into every checkpoint with a head, so
    there is no key of kdcli's own that could contradict it. Without it a head with one output gives a number, several
    outputs that go through a sigmoid are labels that do not exclude each other, and any other
    ``...ForSequenceClassification`` chooses one of its labels.

    Args:
        config: config.json.
        where: What messages call it.

    Raises:
        InputError: Two of its keys contradict each other, or the task is one that kdcli does not have.
    """
    problem, outputs = config.get("problem_type"), _outputs(config)
    if problem is not None:
        if not isinstance(problem, str) or problem not in _PROBLEMS:
            raise InputError(
                f"problem_type {str(problem)[:60]!r} in {where} is unknown to kdcli: "
                f"choose one of {', '.join(_PROBLEMS)}"
            )
        found = _PROBLEMS[problem]
        if found == "text-classification" and outputs == 1:
            raise InputError(
                f"{where} contradicts itself: problem_type {problem!r} chooses one of several labels, "
                "but there is one output",
                "a model that gives a number says problem_type 'regression'",
            )
        if found == "regression" and outputs is not None and outputs > 1:
            raise InputError(
                f"{where} has {outputs} outputs with problem_type 'regression': kdcli judges one number a row",
                "if they are labels, say 'multi_label_classification' or 'single_label_classification'",
            )
        return found
    heads = _architectures(config)
    if heads and not any(head.endswith("ForSequenceClassification") for head in heads):
        return None
    if outputs == 1:
        return "regression"
    if _sigmoid(config):
        return "multi-label"
    return "text-classification" if heads else None


def recorded(config: Mapping[str, Any], where: str = "config.json", metric: str | None = None) -> Task | None:
    """The task of :func:`of_config` with all that config.json keeps of it: thresholds, activation, primary metric.

    Args:
        config: config.json.
        where: What messages call it.
        metric: As ``--metric`` has it; None: the one that the model was made with.

    Raises:
        InputError: As :func:`of_config`, or a stored value cannot be one.
        UsageError: The task has no metric of that name.
    """
    from dataclasses import replace

    name = of_config(config, where)
    if name is None:
        return None
    stored = config.get(METRIC)
    try:
        found = get(name, None if stored is None else str(stored))
    except UsageError as error:
        raise InputError(f"{METRIC} in {where}: {error}", "remove that key") from error
    if metric is not None:
        found = get(name, metric)
    if name == "regression":
        from kdcli.tasks import links

        return replace(found, activation=links.of_config(config, where).name)  # type: ignore[type-var]
    if name != "multi-label" or config.get(THRESHOLDS) is None:
        return found
    from kdcli.tasks.multi_label import MultiLabel

    assert isinstance(found, MultiLabel)
    return replace(found, thresholds=_thresholds(config, where))


def settled(name: str) -> str:
    """What the owner of a model does whose configuration does not say that it is for this task."""
    problem = next(problem for problem, task in _PROBLEMS.items() if task == name)
    return f'write "problem_type": "{problem}" into its config.json'


def agreed(said: Mapping[str, str | None]) -> str | None:
    """The one task that several sources name; None where none does.

    Args:
        said: Source, in words (``config.json of out/student``, ``the data reviews/``) -> task or None.

    Raises:
        InputError: Two of them contradict each other.
    """
    given = [(source, task) for source, task in said.items() if task is not None]
    for source, task in given[1:]:
        if task != given[0][1]:
            first, name = given[0]
            raise InputError(
                f"{first} is for {name}, but {source} is for {task}",
                f"leave it out; or, if the model was trained for {name}: {settled(name)}"
                if first.startswith("--task")
                else "give models of the same task",
            )
    return given[0][1] if given else None


def _check(name: str) -> None:
    if name not in _CLASSES:
        raise UsageError(f"unknown task '{name}': {did_you_mean(name, _CLASSES)}")


def _outputs(config: Mapping[str, Any]) -> int | None:
    """How many outputs a configuration names; None where it names none."""
    for key in ("id2label", "label2id"):
        if isinstance(config.get(key), Mapping) and config[key]:
            return len(config[key])
    number = config.get("num_labels")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _architectures(config: Mapping[str, Any]) -> list[str]:
    given = config.get("architectures") or []
    return [str(name) for name in (given if isinstance(given, list) else [given]) if name]


def _sigmoid(config: Mapping[str, Any]) -> bool:
    """Whether another library's key says that every output is a yes or no of its own."""
    own = config.get("sentence_transformers")
    applied = (
        config.get("function_to_apply"),  # read by transformers' pipeline
        config.get("sbert_ce_default_activation_function"),
        own.get("activation_fn") if isinstance(own, Mapping) else None,
    )
    if any(isinstance(one, str) and one.rpartition(".")[2].casefold() == "sigmoid" for one in applied):
        return True
    return any(
        config.get(key) is True for key in ("multi_label", "multilabel", "is_multi_label", "is_multilabel")
    )


def _thresholds(config: Mapping[str, Any], where: str) -> tuple[float, ...]:
    given, outputs = config[THRESHOLDS], _outputs(config)
    fits = (
        isinstance(given, list)
        and outputs in (None, len(given))
        and all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < 1 for one in given)
    )
    if not fits:
        many = "one" if outputs is None else f"{outputs}, one"
        raise InputError(
            f"{THRESHOLDS} in {where} must be {many} for every label, each between 0 and 1",
            "remove that key to decide at 0.5",
        )
    return tuple(float(one) for one in given)
