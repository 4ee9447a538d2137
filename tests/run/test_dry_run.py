"""``--dry-run`` refuses what the run would refuse, with the same words and exit code, and before a weight is loaded."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdcli import tasks
from kdcli.errors import KdcliError, UsageError
from kdcli.progress import Progress
from kdcli.registry import load
from kdcli.request import Common, Gates, Request, StageOptions
from kdcli.run import dry_run, life
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.lowrank.rule import LinearRule
from kdcli.stages.prune.criterion import Criterion
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.scheme import Scheme
from tests import tiny

LABELS = {
    "text-classification": tiny.LABELS,
    "multi-label": ["joy", "anger", "fear"],
    "regression": ["score"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data of every task, by its name."""
    base, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for name, labels in LABELS.items():
        tiny.of_task(base / name, tasks.get(name), labels)
        rows: list[dict[str, Any]] = [{"text": tiny.sentence(rng, i % 2 == 1)} for i in range(40)]
        for i, row in enumerate(rows):
            if name == "multi-label":
                row["labels"] = rng.sample(labels, 1 + i % 2)
            else:
                row["label"] = rng.random() if name == "regression" else labels[i % 2]
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return base


def request(places: Path, task: str, options: StageOptions, stage: str, **common: Any) -> Request:
    given = Common(data=str(places / f"{task}.jsonl"), out=places / "never", **common)
    return Request(
        stage=stage, model=None if stage == "distill" else str(places / task), options=options, common=given
    )


def distill(places: Path, task: str, common: dict[str, Any] | None = None, **options: Any) -> Request:
    teachers = (str(places / task),)
    chosen = DistillOptions(teachers=teachers, **({"student": "1x16", "epochs": 1} | options))
    return request(places, task, chosen, "distill", **(common or {}))


def refused_alike(given: Request) -> KdcliError:
    """What both say, which is the same."""
    with pytest.raises(KdcliError) as dry:
        dry_run.plan(given, Progress())
    with pytest.raises(KdcliError) as run:
        life.run(given, Progress())
    assert str(dry.value) == str(run.value)
    assert (dry.value.hint, dry.value.exit_code) == (run.value.hint, run.value.exit_code)
    return dry.value


@pytest.mark.parametrize(
    ("task", "options", "common", "words"),
    [
        ("multi-label", {"methods": ("dkd",)}, {}, "method 'dkd' is for answers"),
        ("regression", {"methods": ("dist",)}, {}, "method 'dist' is for answers"),
        ("text-classification", {"methods": ("margin-mse",)}, {}, "method 'margin-mse' is for answers"),
        # Of as many classes as the model has.
        ("text-classification", {"methods": ("dkd",)}, {}, "at least 3 classes and the task has 2"),
        ("regression", {"methods": ("rkd",)}, {"settings": {"rkd.on": "logits"}}, "of a single logit"),
        ("regression", {"strategy": "layerwise"}, {}, "layerwise' mixes probabilities of classes"),
        ("multi-label", {"strategy": "layerwise"}, {}, "the task is multi-label"),
        (
            "text-classification",
            {"methods": ("hidden",), "layer_map": "1:2"},
            {},
            "there is no teacher layer 2",
        ),
        ("regression", {}, {"metric": "accuracy"}, "regression has no metric 'accuracy'"),
        ("regression", {}, {"metric": "ndcg_at_10"}, "ndcg_at_10 orders the rows of a query"),
        ("regression", {}, {"gates": Gates(expressions=("accuracy>=0.9",))}, "accuracy"),
        # It is a metric of the task, and cannot be had of these rows.
        ("regression", {}, {"gates": Gates(expressions=("ndcg_at_10>=0.9",))}, "ndcg_at_10"),
        ("multi-label", {}, {"gates": Gates(expressions=("accuracy>=0.9",))}, "accuracy"),
    ],
)
def test_a_distillation_that_does_not_fit_the_task(
    places: Path, task: str, options: dict[str, Any], common: dict[str, Any], words: str
) -> None:
    assert words in str(refused_alike(distill(places, task, common, **options)))


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("prune", PruneOptions(structure="heads", sparsity=0.5)),
        ("quantize", QuantizeOptions(scheme="fp16")),
        ("lowrank", LowRankOptions(budget=0.5)),
        ("evaluate", EvaluateOptions(batch_sizes=(1,))),
    ],
)
def test_metrics_and_gates_of_another_task(places: Path, stage: str, options: StageOptions) -> None:
    gate = Gates(expressions=("spearman>=0.9",))
    assert "spearman" in str(refused_alike(request(places, "multi-label", options, stage, gates=gate)))
    told = refused_alike(request(places, "multi-label", options, stage, metric="rmse"))
    assert "multi-label has no metric 'rmse'" in str(told)


@pytest.mark.parametrize(
    ("stage", "options", "kind", "name"),
    [
        (
            "prune",
            PruneOptions(structure="neurons", method="magnitude", sparsity=0.5),
            Criterion,
            "magnitude",
        ),
        ("prune", PruneOptions(structure="layers", method="layer-kl", sparsity=0.5), Criterion, "layer-kl"),
        ("quantize", QuantizeOptions(scheme="fp16"), Scheme, "fp16"),
        ("lowrank", LowRankOptions(method="svd", budget=0.5), LinearRule, "svd"),
    ],
)
def test_a_method_of_any_stage_that_is_for_other_answers(
    places: Path, monkeypatch: pytest.MonkeyPatch, stage: str, options: StageOptions, kind: Any, name: str
) -> None:
    import sys

    method = load(stage, name, kind)
    module = next(m for m in list(sys.modules.values()) if vars(m).get("METHOD") is method)
    monkeypatch.setattr(module, "METHOD", replace(method, answers=("one-of",), because="it counts votes"))
    told = refused_alike(request(places, "regression", options, stage))
    assert isinstance(told, UsageError)
    assert f"method '{name}' is for answers" in str(told)


def test_what_fits_is_planned(places: Path) -> None:
    gates = Gates(expressions=("spearman>=0.1", "p50_ms<=1000"))
    found = dry_run.plan(
        distill(places, "regression", {"metric": "pearson", "gates": gates}, methods=("margin-mse",)),
        Progress(),
    )
    assert (found.facts["task"], found.facts["metric"]) == ("regression", "pearson")
    assert not (places / "never").exists()
