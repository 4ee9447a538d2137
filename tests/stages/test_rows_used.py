"""Which rows every stage, strategy, structure and search looks at: a sample of the labels, and none of test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli.context import Context
from kdcli.data.sources import Dataset
from kdcli.export import graph as graphs
from kdcli.inputs.picked import pick
from kdcli.inputs.splits import Splits
from kdcli.measure import environment
from kdcli.models import checkpoint as checkpoints
from kdcli.probe import layer_clock, speedup
from kdcli.probe.speedup import Speed
from kdcli.progress import Progress
from kdcli.request import Common, Gates, Request
from kdcli.stages.distill import lesson
from kdcli.stages.distill import stage as distill
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.lowrank import convolutions, matrices, rank_budget
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize import auto, single_layers
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.auto import Candidate, Tried
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.schemes import dynamic_int8
from tests import tiny
from tests.stages import contexts, watched
from tests.stages.lowrank.test_convolutions import random_cnn


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search looks at is less than the tiny splits have."""
    monkeypatch.setattr(matrices, "JUDGED_ROWS", 8)
    monkeypatch.setattr(convolutions, "JUDGED_ROWS", 8)
    monkeypatch.setattr(matrices, "_ALONE_ROWS", 2)
    monkeypatch.setattr(rank_budget, "GRADIENT_ROWS", 4)
    monkeypatch.setattr(convolutions, "_SAMPLES", 12)
    monkeypatch.setattr(lesson, "TRIAL_ROWS", 16)
    monkeypatch.setattr(single_layers, "SEARCH_ROWS", 12)
    monkeypatch.setattr(single_layers, "SENSITIVITY_ROWS", 6)
    monkeypatch.setattr(dynamic_int8, "ROWS", 8)


def context_of(made: Any, work: Path, options: Any, settings: dict | None = None, drop: float | None = None):
    (work / "model").mkdir()
    checkpoints.save(made, work / "model")
    made = checkpoints.load(work / "model")
    context = contexts.of(options, made, work, splits=watched.splits(), settings=settings)
    common = context.request.common.model_copy(update={"gates": Gates(max_drop=drop)})
    context.request = replace(context.request, common=common)
    return context


UNITS = [
    ({"method": "taylor"}, {"steps": "2", "samples": "12"}),
    ({"method": "fisher"}, {"steps": "2", "samples": "12"}),
    ({"method": "kprune"}, {"samples": "12", "scored": "8"}),
    ({"method": "sensitivity"}, {"samples": "12", "probes": "8"}),
    ({"structure": "heads", "method": "magnitude"}, {}),
    ({"structure": "neurons", "method": "taylor", "epochs": 1}, {"steps": "2", "samples": "12"}),
    ({"method": "taylor", "schedule": "gradual", "epochs": 1}, {"samples": "12"}),
]
OTHER_PARTS = [
    ({"structure": "weights", "method": "magnitude", "epochs": 1}, {}),
    ({"structure": "weights", "method": "sparsegpt"}, {"samples": "12"}),
    ({"structure": "2:4", "method": "wanda"}, {"samples": "12"}),
    ({"structure": "weights", "method": "movement", "epochs": 1}, {}),
    ({"structure": "weights", "method": "wanda", "schedule": "gradual", "epochs": 1}, {"samples": "12"}),
    ({"structure": "layers", "method": "layer-kl"}, {"samples": "12"}),
    ({"structure": "width"}, {"samples": "12"}),
    ({"structure": "vocab+heads+neurons", "epochs": 1}, {"samples": "12"}),
]


@pytest.mark.parametrize(("options", "settings"), UNITS + OTHER_PARTS)
def test_prune_reads_a_sample_of_train_and_nothing_of_test(
    options: dict, settings: dict, tmp_path: Path
) -> None:
    structure = options.get("structure")
    share = {} if structure in ("2:4", "vocab") else {"sparsity": 0.5}
    context = context_of(tiny.checkpoint(), tmp_path, PruneOptions(**options | share), settings)
    _, watch = watched.apply(prune, context)
    assert watch.sampled("train") == bool(settings)


@pytest.mark.parametrize("structure", ["heads+neurons", "weights", "layers"])
def test_prune_searches_a_drop_on_validation(structure: str, tmp_path: Path) -> None:
    options, settings = PruneOptions(structure=structure, epochs=1), {"samples": "12"}
    context = context_of(tiny.checkpoint(), tmp_path, options, settings, drop=0.1)
    applied, _ = watched.apply(prune, context)
    found = applied.method.detail["search"]
    assert (found["split"], found["rows"]) == ("validation", 24)


def test_prune_for_a_speedup_reads_nothing_of_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layer_clock,
        "milliseconds",
        lambda name, made, *args, **kwargs: {
            key: 1.0 + 0.1 * sum(int(part) for part in key.replace("+", " ").split() if part.isdigit())
            for key in made
        },
    )
    monkeypatch.setattr(speedup, "against_input", lambda context, model: Speed(2.0, 0.1))
    options = PruneOptions(method="taylor", target_speedup=1.5)
    context = context_of(tiny.checkpoint(), tmp_path, options, {"steps": "1", "samples": "12"})
    watched.apply(prune, context)


@pytest.mark.parametrize("method", ["svd", "asvd", "fwsvd", "whitening", "two-sided"])
def test_lowrank_reads_a_sample_of_train_and_nothing_of_test(method: str, tmp_path: Path) -> None:
    options = LowRankOptions(method=method, budget=0.6, epochs=1)
    context = context_of(tiny.checkpoint(), tmp_path, options, {"samples": "16"})
    _, watch = watched.apply(lowrank, context)
    assert watch.sampled("train")


def test_lowrank_judges_every_layer_and_share_by_rows_of_all_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held rows, rows of the gradients and rows of single layers are parts of the sample, taken from its front."""
    seen: list[int] = []
    real = matrices.calibration.batches

    def batches(context: Context, rows: Any) -> Any:
        seen.append(len(rows))
        assert set(rows.labels.tolist()) == {0, 1}
        return real(context, rows)

    monkeypatch.setattr(matrices.calibration, "batches", batches)
    options = LowRankOptions(method="svd", budget=0.6)
    context = context_of(tiny.checkpoint(), tmp_path, options, {"samples": "16"})
    watched.apply(lowrank, context)
    assert seen == [12, 4, 4, 2]


@pytest.mark.parametrize("method", ["two-sided", "tucker2"])
def test_lowrank_searches_a_drop_on_a_sample_of_validation(method: str, tmp_path: Path) -> None:
    made = random_cnn() if method == "tucker2" else tiny.checkpoint()
    settings = {} if method == "tucker2" else {"samples": "16"}
    context = context_of(made, tmp_path, LowRankOptions(method=method), settings, drop=0.1)
    applied, watch = watched.apply(lowrank, context)
    assert applied.method.detail["search"]["rows"] == 8
    assert watch.sampled("validation")


@pytest.mark.parametrize("method", ["tucker2", "cp", "tensor-train"])
def test_lowrank_of_convolutions_reads_nothing_of_test(method: str, tmp_path: Path) -> None:
    context = context_of(random_cnn(), tmp_path, LowRankOptions(method=method, budget=0.6))
    _, watch = watched.apply(lowrank, context)
    assert watch.sampled("train")


SCHEMES = [
    ({"scheme": "dynamic-int8", "sensitivity": True}, {}, 0.0),
    ({"scheme": "dynamic-int8"}, {"smooth": "0.5"}, 0.0),
    ({"scheme": "static-int8", "sensitivity": True}, {}, 0.0),
    ({"scheme": "int4", "calibration_samples": 12}, {"rounding": "gptq", "group": "16"}, 0.0),
    ({"scheme": "fp16"}, {}, None),
    ({"scheme": "int8-qat", "epochs": 1}, {}, None),
    ({"scheme": "ternary", "epochs": 1}, {}, None),
    ({"scheme": "binary", "epochs": 1}, {}, None),
]


@pytest.mark.parametrize(("options", "settings", "drop"), SCHEMES)
def test_quantize_reads_nothing_of_test(options: dict, settings: dict, drop: float, tmp_path: Path) -> None:
    given = {"calibration_samples": 12} if settings or options["scheme"] == "static-int8" else {}
    context = context_of(tiny.checkpoint(), tmp_path, QuantizeOptions(**given | options), settings, drop)
    applied, watch = watched.apply(quantize, context)
    if drop is not None:
        assert applied.method.detail["search"]["rows"] == 12
        assert watch.sampled("validation")
    if given:
        assert watch.sampled("train")


def test_quantize_chooses_a_form_for_the_processor_by_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_vnni", lambda: False)
    _, watch = watched.apply(quantize, context_of(tiny.checkpoint(), tmp_path, QuantizeOptions()))
    assert watch.sampled("validation")


def test_quantize_chooses_a_scheme_on_a_sample_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []

    def try_all(context: Context, candidates: Any, rows: Any, *rest: Any) -> list[Tried]:
        judged.append(rows)
        return [Tried(Candidate("fp16", "fp16"), reason="not measured here")]

    monkeypatch.setattr(auto, "_try_all", try_all)
    monkeypatch.setattr(auto, "choose", lambda tried, objective: tried[0])
    context = context_of(tiny.checkpoint(), tmp_path, QuantizeOptions(scheme="auto"), {"rows": "8"})
    applied, watch = watched.apply(quantize, context)
    assert applied.method.detail["auto"]["rows"] == 8
    assert watch.sampled("validation")
    assert np.bincount(judged[0].labels).tolist() == [4, 4]


STRATEGIES = [
    ({"control": True}, {"phases": "one"}),
    ({"epochs": 2}, {"phases": "auto"}),
    ({"labels": 8}, {"phases": "one"}),
    ({"strategy": "self", "control": True}, {"phases": "one", "generations": "2"}),
    ({"strategy": "assistant-chain"}, {"phases": "one", "assistants": "1x16"}),
    ({"strategy": "layerwise"}, {"layer_epochs": "1"}),
    ({"strategy": "layerwise"}, {"layer_epochs": "1", "distill_ensemble": "true", "phases": "one"}),
    ({"strategy": "online", "augment": None}, {"online": "peers"}),
    ({"strategy": "online", "augment": None}, {"online": "teacher"}),
    ({"methods": ("response", "tinybert", "rkd"), "augment": 1}, {"phases": "two"}),
    ({"student": "static"}, {"phases": "one"}),
]


def distillation(
    teacher: Path, work: Path, options: dict, settings: dict | None = None, seed: int = 0
) -> Context:
    """A distillation before its teacher is prepared."""
    given = {"student": "1x16", "epochs": 1, "augment": 0, "init": "random"} | options
    made = checkpoints.load(teacher, labels=list(tiny.LABELS))
    dataset = Dataset("tiny", watched.splits(), "0" * 64, list(tiny.LABELS))
    return Context(
        request=Request(
            stage="distill",
            model=None,
            options=DistillOptions(teachers=(str(teacher),), **given),
            common=Common(settings=settings or {}, seed=seed),
        ),
        checkpoint=made,
        dataset=dataset,
        encoded=Splits(dataset, made),
        device=torch.device("cpu"),
        seed=seed,
        progress=Progress(),
        resume_dir=work / "resume",
    )


@pytest.mark.parametrize(("options", "settings"), STRATEGIES)
def test_distill_reads_nothing_of_test(options: dict, settings: dict, tmp_path: Path) -> None:
    context = distillation(tiny.saved(tmp_path / "teacher"), tmp_path, options, settings)
    with watched.watching(context) as watch:
        contexts.applied(distill, context)
    assert watch.sampled("train") == (settings.get("phases") == "auto")


def test_a_teacher_without_a_head_is_fine_tuned_without_test(tmp_path: Path) -> None:
    made = tiny.untrained()
    made.model.bert.save_pretrained(tmp_path / "teacher")
    made.tokenizer.save_pretrained(tmp_path / "teacher")
    settings = {"teacher_epochs": "1", "phases": "one"}
    context = distillation(tmp_path / "teacher", tmp_path, {}, settings)
    assert not context.checkpoint.has_head
    with watched.watching(context):
        prepared = distill.prepare(context)
    assert prepared.detail["fine_tuned"]


def test_measured_rows_are_a_sample_of_the_labels() -> None:
    """``--limit`` on a sorted file: a model that always gives one answer is right in half of the rows."""
    made = tiny.checkpoint()
    dataset = Dataset("tiny", watched.splits(), "0" * 64, list(tiny.LABELS))
    encoded = Splits(dataset, made)
    picked = pick(dataset, None, 10)
    assert picked.split == "test"
    assert np.bincount(picked.of(encoded).labels).tolist() == [5, 5]
    assert np.array_equal(picked.at, pick(dataset, None, 10).at)
    assert pick(dataset, None, 500).of(encoded) is encoded["test"]


def test_rows_of_a_parity_check_have_all_labels() -> None:
    made = tiny.checkpoint()
    dataset = Dataset("tiny", {"test": watched.sorted_rows(200, 1)}, "0" * 64, list(tiny.LABELS))
    encoded = Splits(dataset, made)["test"]
    found = [int(batch["input_ids"].sum()) for batch in graphs._many(encoded, made)]
    sums = [int(encoded.take([i]).ids.sum()) for i in range(200)]
    assert len(found) == 64
    assert len(set(found) & set(sums[:100])) > 10
    assert len(set(found) & set(sums[100:])) > 10
