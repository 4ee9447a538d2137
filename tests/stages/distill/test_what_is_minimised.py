"""What a training minimises, what teaches it and what chooses its epoch, by formulas written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.data.sources import Rows
from kdcli.inputs import batching
from kdcli.inputs.feeding import model_inputs
from kdcli.stages.distill import plan as plans
from kdcli.stages.distill.strategies import layerwise
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.training import resumable
from kdcli.training.loop import Batch
from tests import tiny
from tests.stages import contexts

ROWS = np.array([1, 4, 8, 9])


class Seen(Exception):
    """Ends the stage once its loss has been looked at."""


def first_logits(model: torch.nn.Module, rows: Any, pad_id: int) -> torch.Tensor:
    batch = batching.collate(rows, ROWS, pad_id)
    with torch.no_grad():
        return model(**model_inputs(model, batch, "cpu")).logits


def stage_of(name: str, made: Any, work: Path) -> tuple[Any, Callable[[], Any]]:
    splits = {
        "train": contexts.rows(24, 1),
        "validation": contexts.rows(8, 2),
        "test": Rows(["a"], None, None),
    }
    given: Any = PruneOptions(structure="weights", method="magnitude", sparsity=0.5, epochs=2)
    settings: dict[str, str] = {}
    if name == "lowrank":
        given = LowRankOptions(method="svd", budget=0.4, epochs=2)
    if name == "quantize":
        given = QuantizeOptions(scheme="ternary", epochs=2)
        settings = {"hidden": "0", "alpha": "0.7", "temperature": "3"}
    context = contexts.of(given, made, work, splits=splits, settings=settings)
    stage = {"prune": prune, "lowrank": lowrank, "quantize": quantize}[name]
    return context, lambda: contexts.applied(stage, context)


@pytest.mark.parametrize(
    ("name", "alpha", "temperature"), [("prune", 0.9, 2.0), ("lowrank", 0.9, 2.0), ("quantize", 0.7, 3.0)]
)
def test_the_input_model_teaches_and_labels_help(
    name: str, alpha: float, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1 - alpha) CE(y, s) + alpha T^2 KL(t || s), t the model as it came, s as it is now; validation chooses."""
    made = tiny.reload(tiny.checkpoint(), tmp_path / "model")
    context, work = stage_of(name, made, tmp_path)
    train = context.encoded["train"]
    dense = first_logits(made.model, train, made.pad_id)
    found: dict[str, Any] = {}

    def fit(model: Any, rows: Any, validation: Any, loss: Any, options: Any, **more: Any) -> Any:
        assert rows is train
        assert validation is context.encoded["validation"]
        assert (options.epochs, options.keep, options.patience) == (2, "best", None)
        if name == "prune":  # what was set to zero is put back to zero after a step
            weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
            zero = weight == 0
            assert zero.any()
            with torch.no_grad():
                weight.add_(1.0)
            more["after_step"]()
            assert torch.equal(weight == 0, zero)
            with torch.no_grad():
                weight.sub_((~zero).to(weight))
        batch = batching.collate(rows, ROWS, made.pad_id)
        output = model(**model_inputs(model, batch, "cpu"))
        mask = torch.from_numpy(batch["attention_mask"]).bool()
        found["value"] = float(loss(output, Batch(ROWS, mask, 0.0)).detach())
        found["logits"] = output.logits.detach()
        raise Seen

    monkeypatch.setattr(resumable, "fit", fit)
    with pytest.raises(Seen):
        work()
    own, labels = found["logits"], torch.from_numpy(train.labels[ROWS])
    assert float((own - dense).abs().max()) > 1e-4
    t, s = ((x / temperature).softmax(-1) for x in (dense, own))
    divergence = float((t * (t / s).log()).sum(1).mean()) * temperature**2
    wanted = (1 - alpha) * float(F.cross_entropy(own, labels)) + alpha * divergence
    assert found["value"] == pytest.approx(wanted, rel=1e-4)  # float32


def test_the_mean_over_tokens_leaves_padding_out() -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    found = layerwise.mean_of(states, mask)
    for row, length in enumerate((5, 2, 1)):
        torch.testing.assert_close(found[row], states[row, :length].mean(0))


def test_a_layers_classifier_answers_alike_with_more_padding() -> None:
    made = tiny.checkpoint()
    part = layerwise.LayerClassifier(made, 1, 2).eval()
    batch = tiny.batch()
    pad = torch.full((len(batch["input_ids"]), 4), made.pad_id)
    wide = {
        "input_ids": torch.cat([batch["input_ids"], pad], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(pad)], 1),
    }
    with torch.no_grad():
        one, two = part(**batch).logits, part(**wide).logits
    part.close()
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)  # float32 sums in another order


def test_every_member_of_an_ensemble_learns_its_own_layers_answers(tmp_path: Path) -> None:
    from tests.stages.test_rows_used import distillation

    context = distillation(
        tiny.saved(tmp_path / "teacher"),
        tmp_path,
        {"strategy": "layerwise", "alpha": 0.7, "temperature": 3.0},
    )
    plan = plans.check(context.request)
    rows = context.encoded["train"]
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(len(rows), 2, 2, generator=generator)
    every = torch.randn(2, len(ROWS), 2, generator=generator)
    loss = layerwise._loss(context, plan, rows, targets.numpy())
    found = float(loss({"every": list(every)}, Batch(ROWS, torch.ones(4, 3).bool(), 0.0)))
    labels = torch.from_numpy(rows.labels[ROWS])
    wanted = 0.0
    for member in range(2):
        t, s = (targets[ROWS, member] / 3).softmax(-1), (every[member] / 3).softmax(-1)
        soft = 9 * float((t * (t / s).log()).sum(1).mean())
        wanted += (0.3 * float(F.cross_entropy(every[member], labels)) + 0.7 * soft) / 2
    assert found == pytest.approx(wanted, rel=1e-5)
