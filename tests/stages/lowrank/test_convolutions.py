"""The lowrank stage on the text model of convolutions, from the checkpoint to the graph and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from kdcli.errors import InputError, UsageError
from kdcli.models import checkpoint as checkpoints
from kdcli.models import conv_factors
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.conv_factors import KINDS, FactorisedConv
from kdcli.models.small import CnnConfig, CnnForSequenceClassification
from kdcli.models.transforms import TransformLog
from kdcli.progress import Progress
from kdcli.report.schema import Report
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.lowrank import stage
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny
from tests.stages import contexts
from tests.stages.lowrank.test_stage import context_of

NAMES = [f"convolutions.{i}" for i in range(3)]


def random_cnn() -> Checkpoint:
    """A random model with windows of 1, 3 and 4 tokens."""
    tok = tiny.tokenizer()
    torch.manual_seed(0)
    model = CnnForSequenceClassification(
        CnnConfig(
            vocab_size=len(tok),
            hidden_size=20,
            intermediate_size=24,
            widths=[1, 3, 4],
            max_position_embeddings=42,
            pad_token_id=tok.pad_token_id,
            id2label=dict(enumerate(tiny.LABELS)),
            label2id={name: i for i, name in enumerate(tiny.LABELS)},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Checkpoint(model.eval(), tok, list(tiny.LABELS), TransformLog(), Path("/nonexistent"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("conv")
    (base / "cnn").mkdir()
    checkpoints.save(random_cnn(), base / "cnn")
    tiny.write_data(base / "data", {"train": 60, "validation": 20, "test": 20})
    return base


def run(name: Any, model: Path, out: Path, options: Any, places: Path) -> Report:
    common = Common(out=out, data=str(places / "data"))
    return life.run(Request(stage=name, model=str(model), options=options, common=common), Progress()).report


def lowrank(model: Path, out: Path, places: Path, **options: Any) -> Report:
    return run("lowrank", model, out, LowRankOptions(**options), places)


def logits(made: Checkpoint | Path) -> torch.Tensor:
    model = (checkpoints.load(made) if isinstance(made, Path) else made).model
    with torch.no_grad():
        return model(**tiny.batch()).logits


def from_graph(directory: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    given = {i.name: tiny.batch()[i.name].numpy() for i in session.get_inputs()}
    return session.run(None, given)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_budget_log_graph_and_back(kind: str, places: Path) -> None:
    out = places / kind
    report = lowrank(places / "cnn", out, places, method=kind, budget=0.6)
    assert report.exit_code == 0
    assert report.parity is not None
    assert report.parity.passed
    model = checkpoints.load(out).model
    assert report.method is not None
    table = {row["name"]: row for row in report.method.layers}
    assert list(table) == NAMES
    before = after = 0
    for name, row in table.items():
        layer: Any = model.get_submodule(name)
        assert sum(p.numel() for p in layer.parameters()) == row["parameters_after"]
        before, after = before + row["parameters_before"], after + row["parameters_after"]
        assert row["kept_dense"] == (not isinstance(layer, FactorisedConv))
        if not row["kept_dense"]:
            assert (layer.kind, list(layer.ranks)) == (kind, row["rank"])
            assert row["parameters_after"] < row["parameters_before"]
            assert 0 < row["error_predicted"] < 1
            assert 0 < row["error_measured"] < 2
    assert after <= 0.6 * before
    (entry,) = json.loads((out / "kdcli.json").read_text())["transforms"]
    assert (entry["op"], entry["kind"]) == ("factorise_conv", kind)
    assert entry["ranks"] == {name: row["rank"] for name, row in table.items() if not row["kept_dense"]}
    want = logits(out)
    # float32 sums in another order, as in export/parity.py.
    np.testing.assert_allclose(from_graph(out), want.numpy(), atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(want, logits(places / "cnn"), atol=1e-3)


@pytest.mark.parametrize("kind", ["tucker2", "tensor-train"])
def test_all_energy_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Channels that are copies of others make room for factors without loss."""
    made = random_cnn()
    with torch.no_grad():
        for layer in made.model.convolutions:
            layer.weight[8:16] = layer.weight[:8]
            layer.weight[16:] = layer.weight[:8]
            layer.weight[:, 5:10] = layer.weight[:, :5]
            layer.weight[:, 10:] = 0.0
    want = logits(made)
    method = contexts.applied(stage, context_of(made, tmp_path, method=kind, energy=1.0)).method
    assert not any(row["kept_dense"] for row in method.layers)
    assert method.detail["parameters_kept"] < 0.5
    torch.testing.assert_close(logits(made), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"method": "cp", "rank": 3}, [[3], [3], [3]]),
        ({"method": "tucker2", "rank": 3}, [[3, 3], [3, 3], [3, 3]]),
        ({"method": "tensor-train", "rank": 3, "include": ["*.0", "*.2"]}, [[3], [3, 3]]),
        ({"method": "tucker2", "rank": "evbmf"}, [[1, 1]] * 3),  # random weights are noise
        ({"method": "tucker2", "rank": 99}, [None] * 3),  # at or above break-even
    ],
)
def test_ranks_by_hand(options: dict[str, Any], ranks: list[Any], tmp_path: Path) -> None:
    made = random_cnn()
    applied = contexts.applied(stage, context_of(made, tmp_path, **options))
    assert [row["rank"] for row in applied.method.layers] == ranks
    codes = [w.code for w in applied.warnings]
    assert ("nothing-factorised" in codes) == (ranks[0] is None)
    torch.testing.assert_close(logits(tiny.reload(made, tmp_path / "out")), logits(made), rtol=0, atol=1e-6)


def test_quantize_goes_on_from_factors(places: Path, tmp_path: Path) -> None:
    made = random_cnn()
    contexts.applied(stage, context_of(made, tmp_path, method="cp", rank=4))
    tiny.reload(made, tmp_path / "made")
    small = run("quantize", tmp_path / "made", tmp_path / "int8", QuantizeOptions(), places)
    assert small.exit_code == 0
    kinds = [type(m) for m in checkpoints.load(tmp_path / "int8").model.modules()]
    assert kinds.count(FactorisedConv) == 3


def test_merge_multiplies_back(tmp_path: Path) -> None:
    made = random_cnn()
    contexts.applied(stage, context_of(made, tmp_path, method="cp", rank=4))
    want, chains = logits(made), {name: made.model.get_submodule(name) for name in NAMES}
    contexts.applied(stage, context_of(made, tmp_path, merge=True))
    # Which ones pay is a matter of the clock; what comes out is the same.
    for name, chain in chains.items():
        layer: Any = made.model.get_submodule(name)
        if layer is not chain:
            assert type(layer) is nn.Conv1d
            torch.testing.assert_close(layer.weight, conv_factors.kernel(chain).float())
    again = tiny.reload(made, tmp_path / "merged")
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_recovery_trains_the_factors(places: Path, tmp_path: Path) -> None:
    made = checkpoints.load(places / "cnn")  # the teacher of the recovery is read from disk
    applied = contexts.applied(stage, context_of(made, tmp_path, method="tucker2", rank=4, epochs=1))
    assert "recovery" in applied.method.detail
    untrained = random_cnn()
    contexts.applied(stage, context_of(untrained, tmp_path, method="tucker2", rank=4))
    for name in NAMES:
        trained, start = (m.model.get_submodule(name).state_dict() for m in (made, untrained))
        assert not any(torch.equal(trained[key], start[key]) for key in start)


def test_a_second_run_finds_nothing_dense(tmp_path: Path) -> None:
    made = random_cnn()
    contexts.applied(stage, context_of(made, tmp_path, method="cp", rank=2))
    before = logits(made)
    applied = contexts.applied(stage, context_of(made, tmp_path, method="tucker2", rank=2))
    assert [w.code for w in applied.warnings] == ["nothing-factorised"]
    assert torch.equal(logits(made), before)


def test_a_budget_below_the_lowest_ranks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--budget 0\.01 cannot be met"):
        stage.prepare(context_of(random_cnn(), tmp_path, method="tucker2", budget=0.01))


def test_matrices_of_a_text_model_of_convolutions_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'kdcli-cnn' has no heads") as caught:
        stage.prepare(context_of(random_cnn(), tmp_path, budget=0.5))
    assert "--method tucker2" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tucker2"', '"tucker9"', "unknown form 'tucker9'"),
        ('"convolutions.1"', '"convolutions.7"', r"convolutions\.7"),
        ('"convolutions.1"', '"classifier"', "not a convolution"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    made = random_cnn()
    contexts.applied(stage, context_of(made, tmp_path, method="tucker2", rank=3))
    tiny.reload(made, tmp_path / "out")
    path = tmp_path / "out" / "kdcli.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        checkpoints.load(tmp_path / "out")
