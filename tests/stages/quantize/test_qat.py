"""Trained schemes through the stage: what they learn, what is on the disk, and that the graph runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcli.errors import UsageError
from kdcli.export import runtimes
from kdcli.inputs.feeding import torch_runner
from kdcli.models import activations
from kdcli.models import checkpoint as checkpoints
from kdcli.models.compressed import layouts_of
from kdcli.request import Common, Request
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize import oldest_runtime
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize import stage as quantize
from kdcli.training.recovery import zeros_of
from tests import tiny
from tests.models.test_small import made as small
from tests.stages import contexts
from tests.stages.quantize.test_static import LOGIT_TOLERANCE, answers, batch, context_of, executed, graphs


def on_disk(work: Path, **sizes: int):
    """A model whose files a training can take its teacher from."""
    return checkpoints.load(tiny.saved(work / "model", by_kdcli=True, **sizes))


def apply(made, work: Path, scheme: str, settings: dict[str, str] | None = None, **options):
    context = context_of(made, work, settings, scheme=scheme, **options)
    return contexts.applied(quantize, context)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))


def test_int8_qat_gives_a_static_graph_with_the_ranges_of_the_training(tmp_path: Path) -> None:
    made = on_disk(tmp_path)
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    applied = apply(made, tmp_path, "int8-qat", {"lr": "0.001"}, epochs=2)
    assert applied.method.detail["training"]["epochs"] == 2
    log = applied.checkpoint.log.quantised
    matrices = {name for name, module in made.model.named_modules() if isinstance(module, nn.Linear)}
    assert set(log.activations) == matrices
    assert all(0 < scale < 1 and 0 <= zero <= 255 for scale, zero in log.activations.values())
    source, target, detail = graphs(applied, made, tmp_path)
    assert detail["float"] == []
    ran = executed(target, tmp_path)
    assert ran["QAttention"] == 2
    assert ran["DynamicQuantizeLinear"] == ran["DequantizeLinear"] == 0
    arrays = batch(made)
    assert 0 < np.abs(answers(source, arrays) - answers(target, arrays)).max() < LOGIT_TOLERANCE
    loaded = checkpoints.load(tmp_path / "out")
    moved = [
        n
        for n in matrices
        if not torch.equal(loaded.model.get_parameter(f"{n}.weight"), dense[f"{n}.weight"])
    ]
    assert set(moved) == matrices


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_few_bits_are_packed_on_the_disk_and_in_the_graph(scheme: str, tmp_path: Path) -> None:
    made = on_disk(tmp_path)
    applied = apply(made, tmp_path, scheme, {"activations": "float"}, epochs=1)
    bits = {"ternary": 2, "binary": 1}[scheme]
    assert applied.method.detail["training"]["methods"] == ["response", "tinybert"]
    inside = {
        f"{n}.weight" for n, m in made.model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n
    }
    by_bits: dict[int, set[str]] = {}
    for layout in layouts_of(applied.checkpoint.log.quantised):
        by_bits.setdefault(layout.bits, set()).update(layout.tensors)
    token = "bert.embeddings.word_embeddings.weight"
    outside = {"classifier.weight", "bert.pooler.dense.weight"}
    outside |= {f"bert.embeddings.{part}_embeddings.weight" for part in ("position", "token_type")}
    assert by_bits == (
        {2: inside | {token}, 8: outside} if bits == 2 else {1: inside, 2: {token}, 8: outside}
    )
    for name in inside:
        codes = applied.integers[name].values
        assert set(codes.unique().tolist()) <= ({-1, 0, 1} if bits == 2 else {-1, 1})
        assert len(applied.integers[name].scale.unique()) == (1 if bits == 2 else len(codes))
    source, target, detail = graphs(applied, made, tmp_path)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name in inside:
        rows, columns = applied.integers[name].values.shape
        assert state[f"{name}_packed"].shape == (rows, -(-columns * bits // 32))
    assert detail["float"] == []
    # No activation is rounded, so logits agree to float32 sums.
    arrays = batch(made)
    loaded = checkpoints.load(tmp_path / "out")
    with torch.no_grad():
        want = loaded.model(
            **{k: torch.from_numpy(v) for k, v in arrays.items() if k != "token_type_ids"}
        ).logits.numpy()
    assert np.abs(want - answers(target, arrays)).max() < 1e-4
    assert np.abs(want - answers(source, arrays)).max() < 1e-4


@pytest.mark.parametrize(
    ("scheme", "family"), [("ternary", "bert"), ("binary", "bert"), ("ternary", "mpnet")]
)
def test_few_bits_run_as_8_bit_products_on_rounded_activations(
    scheme: str, family: str, tmp_path: Path
) -> None:
    made = checkpoints.load(tiny.saved(tmp_path / "model", family, by_kdcli=True))
    applied = apply(made, tmp_path, scheme, epochs=1)
    log = applied.checkpoint.log.quantised
    matrices = {name for name, module in made.model.named_modules() if isinstance(module, nn.Linear)}
    assert log.rounds == "fixed"
    assert set(log.activations) == matrices  # every one has a range that the training found
    assert applied.warnings == []
    _, target, detail = graphs(applied, made, tmp_path)
    assert detail["float"] == []
    # Matrices of the encoder keep their bits in the file, and are integers of 8 bits when it is open.
    inside = sum(made.model.get_parameter(f"{n}.weight").numel() for n in matrices if ".layer." in n)
    bits = {"ternary": 2, "binary": 1}[scheme]
    table = 2 if made.model.get_input_embeddings().weight.shape[1] % 4 == 0 else 8
    packed = sum(n for kind, n in detail["stored"].items() if kind.endswith(", packed"))
    assert packed == inside + made.model.get_input_embeddings().weight.numel() * (table == 2)
    assert f"int{bits}, packed" in detail["stored"]
    assert set(detail["executed"]) == {"fixed ranges, by 8-bit products", "float, looked up"}
    ran = executed(target, tmp_path)
    foreign = {node.op_type for node in onnx.load(str(target)).graph.node if node.domain == "com.microsoft"}
    assert not foreign & {"MatMulNBits", "GatherBlockQuantized"}
    assert not set(ran) & {"Gemm", "FusedGemm", "DynamicQuantizeMatMul", "MatMulNBits", "DequantizeLinear"}
    assert runtimes.of_graph(onnx.load(str(target))) == oldest_runtime.of_scheme(
        *applied_config(scheme), "int8"
    )
    # The reloaded checkpoint rounds as the graph does: only values on the edge of a step differ.
    arrays = batch(made)
    loaded = checkpoints.load(tmp_path / "out")
    rounded = np.concatenate(
        [
            torch_runner(loaded)({k: v[i : i + 1, :n] for k, v in arrays.items()})
            for i, n in enumerate(arrays["attention_mask"].sum(1))
        ]
    )
    got = answers(target, arrays)
    assert np.median(np.abs(rounded - got).max(1)) < 1e-4
    assert np.abs(rounded - got).max() < LOGIT_TOLERANCE
    with activations.paused(loaded.model):
        unrounded = torch_runner(loaded)({k: v[:, :] for k, v in arrays.items()})
    assert np.abs(unrounded - got).max() > 1e-3  # and it is a rounding


def applied_config(scheme: str):
    found = plans.settle(scheme, {})
    return found.scheme, found.config


def with_zeros(work: Path):
    """A model of which ``prune --structure weights`` has removed half; where its zeros are."""
    made = on_disk(work)
    options = PruneOptions(structure="weights", method="magnitude", sparsity=0.5)
    request = Request(stage="prune", model="m", options=options, common=Common())
    context = dataclasses.replace(context_of(made, work), request=request)
    contexts.applied(prune, context)
    (pruned := work / "pruned").mkdir()
    checkpoints.save(made, pruned)
    made = checkpoints.load(pruned)
    return made, {name: zero.clone() for name, (_, zero) in zeros_of(made).items()}


@pytest.mark.parametrize(
    ("scheme", "settings", "epochs"),
    [
        ("int8-qat", {"lr": "0.003"}, 1),
        ("int8-qat", {"lr": "0.003", "unsigned": "true", "smooth": "0.5"}, 1),
        ("ternary", {"lr": "0.003"}, 1),
        ("int4", {}, 0),
        ("int4", {"rounding": "hqq"}, 0),
        ("static-int8", {}, 0),
    ],
)
def test_zeros_of_an_earlier_stage_stay(
    scheme: str, settings: dict[str, str], epochs: int, tmp_path: Path
) -> None:
    made, zeros = with_zeros(tmp_path)
    assert len(zeros) == 12
    dense = {name: made.model.get_parameter(name).detach().clone() for name in zeros}
    applied = apply(made, tmp_path, scheme, settings, epochs=epochs)
    (out := tmp_path / "out").mkdir()
    checkpoints.save(applied.checkpoint, out, integers=applied.integers)
    loaded = checkpoints.load(out)
    for name, zero in zeros.items():
        matrix = applied.integers[name]
        assert bool((matrix.dense()[zero] == 0).all()), name
        assert matrix.zero is not None or bool((matrix.values[zero] == 0).all()), name
        now = loaded.model.get_parameter(name)
        assert bool((now[zero] == 0).all())
        assert not torch.equal(now, dense[name])
    assert applied.warnings == []


def test_one_bit_fills_zeros_and_says_so(tmp_path: Path) -> None:
    made, zeros = with_zeros(tmp_path)
    applied = apply(made, tmp_path, "binary", epochs=1)
    (warning,) = applied.warnings
    assert warning.code == "zeros-refilled"
    assert "12 matrices" in warning.message
    assert "--scheme ternary" in warning.message
    for name, zero in zeros.items():
        assert set(applied.integers[name].values[zero].unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_training_brings_the_model_back_to_its_teacher(scheme: str, tmp_path: Path) -> None:
    on_disk(tmp_path)
    losses = {}
    for lr in ("1e-12", "0.003"):
        (work := tmp_path / lr).mkdir()
        applied = apply(checkpoints.load(tmp_path / "model"), work, scheme, {"lr": lr}, epochs=3)
        losses[lr] = applied.method.detail["training"]["history"][-1]["loss"]
    # distance of answers, attention scores and hidden states from those of the model that came in
    assert losses["0.003"] < 0.7 * losses["1e-12"]


def test_the_same_seed_gives_the_same_integers(tmp_path: Path) -> None:
    made = on_disk(tmp_path, layers=1)
    found = []
    for number in range(2):
        (work := tmp_path / str(number)).mkdir()
        found.append(apply(checkpoints.load(made.path), work, "int8-qat", epochs=1))
    one, two = found
    assert one.checkpoint.log.quantised == two.checkpoint.log.quantised
    assert all(torch.equal(one.integers[n].values, two.integers[n].values) for n in one.integers)


def test_tables_can_have_another_format(tmp_path: Path) -> None:
    made = on_disk(tmp_path, layers=1)
    applied = apply(made, tmp_path, "ternary", {"tables": "false", "scale": "row"}, epochs=1)
    assert applied.integers["bert.embeddings.word_embeddings.weight"].bits == 8
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert len(applied.integers[name].scale.unique()) > 1


def test_a_model_without_matrices_is_refused(tmp_path: Path) -> None:
    made = small("cnn")
    with pytest.raises(UsageError, match="none is left to quantise"):
        apply(made, tmp_path, "ternary", {"tables": "false"}, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "must be at least 0"),
        ({"calibration": "mse"}, "--calibration"),
        ({"sensitivity": True}, "--sensitiv"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    with pytest.raises(UsageError, match=message):
        quantize.prepare(context_of(made, tmp_path, scheme="binary", **options))
