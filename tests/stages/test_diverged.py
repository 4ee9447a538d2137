"""Trainings with a rate that blows them up, in every stage: told as that, before anything is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import ExitCode, InputError
from kdcli.stages.distill import stage as distill
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny
from tests.stages import contexts
from tests.stages.test_rows_used import distillation


def rows() -> dict[str, Any]:
    return {"train": contexts.rows(48, 1), "validation": contexts.rows(24, 2)}


def trained_at(stage: str, rate: float, work: Path) -> Callable[[], Any]:
    """What trains in a stage with a peak learning rate, ready to run."""
    if stage == "student":
        options = {"lr": rate, "batch_size": 8}
        context = distillation(tiny.saved(work / "teacher"), work, options, {"phases": "one"})
        return lambda: contexts.applied(distill, context)
    if stage == "teacher":
        made = tiny.untrained()
        made.model.bert.save_pretrained(work / "teacher")
        made.tokenizer.save_pretrained(work / "teacher")
        settings = {"teacher_lr": str(rate), "teacher_epochs": "1", "teacher_batch_size": "8"}
        return lambda: distill.prepare(distillation(work / "teacher", work, {}, settings))
    made, settings = tiny.reload(tiny.checkpoint(), work / "model"), {"samples": "12"}
    given: Any = PruneOptions(method="taylor", sparsity=0.3, epochs=1, lr=rate, batch_size=8)
    if stage == "lowrank":
        given = LowRankOptions(method="svd", epochs=1, lr=rate, batch_size=8)
    if stage == "quantize":
        given, settings = QuantizeOptions(scheme="int8-qat", epochs=1), {"lr": str(rate)}
    context = contexts.of(given, made, work, splits=rows(), settings=settings)
    module = {"prune": prune, "lowrank": lowrank, "quantize": quantize}[stage]
    return lambda: contexts.applied(module, context)


@pytest.mark.parametrize("rate", [0.5, 5.0, 1e6])
@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("student", "--lr"),
        ("teacher", "--set teacher_lr=RATE"),
        ("prune", "--lr"),
        ("lowrank", "--lr"),
        ("quantize", "--set lr=RATE"),
    ],
)
def test_every_training_says_so_in_its_first_epoch(
    stage: str, option: str, rate: float, tmp_path: Path
) -> None:
    work = trained_at(stage, rate, tmp_path)
    with pytest.raises(InputError, match="diverged: the loss") as found:
        work()
    assert found.value.exit_code == ExitCode.INPUT
    assert f"the peak learning rate was {rate:g}; give a lower one with {option}" in str(found.value.hint)


def test_a_single_step_says_so_too(tmp_path: Path) -> None:
    options = {"lr": 5.0, "batch_size": 128}
    context = distillation(tiny.saved(tmp_path / "teacher"), tmp_path, options, {"phases": "one"})
    with pytest.raises(InputError, match="diverged"):
        contexts.applied(distill, context)


@pytest.mark.parametrize("rate", [0.5, 5.0, 1e3])
def test_later_epochs_say_so_too(rate: float, tmp_path: Path) -> None:
    options = {"lr": rate, "batch_size": 8, "epochs": 3}
    context = distillation(tiny.saved(tmp_path / "teacher"), tmp_path, options, {"phases": "one"})
    with pytest.raises(InputError, match="diverged"):
        contexts.applied(distill, context)


def test_usual_rates_go_through(tmp_path: Path) -> None:
    for rate in (1e-4, 5e-3):
        made = tiny.reload(tiny.checkpoint(), tmp_path / f"model-{rate}")
        options = PruneOptions(method="taylor", sparsity=0.3, epochs=1, lr=rate, batch_size=8)
        context = contexts.of(options, made, tmp_path / str(rate), splits=rows(), settings={"samples": "12"})
        assert contexts.applied(prune, context).method.detail["recovery"]["epochs"] == 1
