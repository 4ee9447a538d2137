"""The quantize stage on tiny models: what it stores, what it reports, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.export import fusion, sessions
from kdcli.export import onnx as exporter
from kdcli.inputs.feeding import model_inputs, torch_runner
from kdcli.inputs.text import TEXT
from kdcli.models import activations, transforms
from kdcli.models import checkpoint as checkpoints
from kdcli.models.transforms import Cut, Factorise, Quantise
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny
from tests.stages import contexts


def context_of(made, work: Path, *, settings=None, **options) -> Context:
    return contexts.without_data(
        contexts.of(QuantizeOptions(**options), made, work, splits={}, settings=settings)
    )


def stored(made, work: Path, **options):
    """Apply the stage and save its result; returns (what it did, the directory)."""
    applied = contexts.applied(quantize, context_of(made, work, **options))
    (out := work / "out").mkdir()
    checkpoints.save(applied.checkpoint, out, integers=applied.integers)
    return applied, out


def logits(model, family: str) -> torch.Tensor:
    with torch.no_grad(), activations.paused(model):  # weights alone
        return model(**tiny.batch(family)).logits


def surgery(made, case: str) -> None:
    if case == "cut":
        cut = Cut(heads={0: [1], 1: []}, neurons={0: [0, 3, 5], 1: []})
        transforms.apply(made.model, cut)
        made.log.transforms.append(cut)
    elif case == "factorised":
        factors = Factorise(ranks={f"{made.family.layers}.0.{made.family.ffn_in}": 7})
        for name, rank in factors.ranks.items():
            pair = transforms.factorise(made.model, name, rank)
            nn.init.normal_(pair.first.weight, std=0.3)
            nn.init.normal_(pair.second.weight, std=0.3)
        made.log.transforms.append(factors)


@pytest.mark.parametrize("case", ["dense", "cut", "factorised"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoint_is_integers_on_disk_and_the_rounded_model_when_loaded(
    family: str, case: str, tmp_path: Path
) -> None:
    made = tiny.checkpoint(family)
    surgery(made, case)
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    before = logits(made.model, family)
    applied, out = stored(made, tmp_path)
    names = {f"{name}.weight" for name, m in made.model.named_modules() if isinstance(m, nn.Linear)}
    names |= {name for name in dense if name.endswith("_embeddings.weight")}
    assert set(applied.integers) == names

    state = load_file(out / "model.safetensors")
    assert {name for name, tensor in state.items() if tensor.dtype == torch.int8} == names
    for name in names:
        values, scale = state[name], state[f"{name}_scale"]
        assert scale.shape == (len(values), 1)
        assert bool(((values.double() * scale.double() - dense[name].double()).abs() <= 0.5001 * scale).all())
        assert int(values.int().abs().max()) == (127 if "_embeddings" in name else 64)
    for name in set(dense) - names:
        assert torch.equal(state[name], dense[name])

    loaded = checkpoints.load(out)
    assert torch.equal(logits(loaded.model, family), logits(made.model, family))
    assert not torch.equal(logits(loaded.model, family), before)
    assert (logits(loaded.model, family) - before).abs().max() < 0.15  # of order 1
    # What was loaded quantises to the very integers that are on the disk.
    again = contexts.applied(quantize, context_of(loaded, tmp_path))
    for name, matrix in again.integers.items():
        assert torch.equal(matrix.values, state[name])
    assert [type(t) for t in again.checkpoint.log.transforms].count(Quantise) == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_onnx_of_the_reloaded_checkpoint_holds_the_stored_integers(family: str, tmp_path: Path) -> None:
    applied, out = stored(tiny.checkpoint(family), tmp_path)
    loaded = checkpoints.load(out)
    ids = np.zeros((1, 2), dtype=np.int64)
    probe = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
    names = list(model_inputs(loaded.model, probe, "cpu"))
    example = TEXT.example(loaded.config.vocab_size, names, "cpu")
    with activations.paused(loaded.model):
        exporter.export(loaded.model, example, tmp_path / "plain.onnx")
    fusion.fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", embeddings=False)
    detail = applied.rewrite_onnx(tmp_path / "fused.onnx", tmp_path / "int8.onnx")
    assert detail["float"] == []
    assert json.dumps(detail)
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    in_graph = [numpy_helper.to_array(t) for t in graph.initializer]
    state = load_file(out / "model.safetensors")
    stored_bytes = sum(t.numel() for t in state.values() if t.dtype == torch.int8)
    assert sum(a.size for a in in_graph if a.dtype == np.int8) == stored_bytes
    tables = [a for a in in_graph if a.dtype == np.int8 and np.abs(a.astype(int)).max() == 127]
    expected = [t.numpy() for name, t in state.items() if name.endswith("_embeddings.weight")]
    assert sorted(a.tobytes() for a in tables) == sorted(a.tobytes() for a in expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_reloaded_checkpoint_rounds_activations_as_the_graph_does(family: str, tmp_path: Path) -> None:
    applied, out = stored(tiny.checkpoint(family), tmp_path)
    loaded = checkpoints.load(out)
    batch = {k: v.numpy() for k, v in tiny.batch(family, 30).items()}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    names = list(model_inputs(loaded.model, batch, "cpu"))
    example = TEXT.example(loaded.config.vocab_size, names, "cpu")
    with activations.paused(loaded.model):
        exporter.export(loaded.model, example, tmp_path / "plain.onnx")
    applied.rewrite_onnx(tmp_path / "plain.onnx", tmp_path / "int8.onnx")
    run = sessions.runner(sessions.open_session(tmp_path / "int8.onnx", threads=1, spinning=False))
    own = torch_runner(loaded)
    alone = []
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        row = {name: values[i : i + 1, :length] for name, values in batch.items()}
        with activations.paused(loaded.model):
            plain = own(row)
        alone.append((run(row), own(row), plain))
    want, got, plain = (np.concatenate(part) for part in zip(*alone, strict=True))
    # Rounding moves logits of order 1 by up to 0.16. What is left are quotients at a half, which the two may round
    # to different sides; each moves what follows by one step of 256.
    assert np.abs(want - got).max() < 0.5 * np.abs(want - plain).max()
    assert np.abs(want - got).mean() < 0.25 * np.abs(want - plain).mean()
    activations.detach(loaded.model)
    assert np.array_equal(own(row), plain[-1:])


def test_report_counts_weights_and_the_largest_sum(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    applied = contexts.applied(quantize, context_of(made, tmp_path))
    detail = applied.method.detail
    assert detail["integer_weights"] + detail["float_weights"] == sum(
        p.numel() for p in made.model.parameters()
    )
    assert detail["integer_weights"] == sum(m.values.numel() for m in applied.integers.values())
    assert detail["largest"] == 64
    assert detail["largest_pair_sum"] == 32640 <= 32767
    assert applied.warnings == []
    assert applied.method.params == {
        "scheme": "dynamic-int8",
        "embeddings": "int8",
        "keep_fp32": [],
        "bits": 8,
        "reduce_range": True,
        "unsigned": False,
        "smooth": 0.0,
    }
    rows = {row["name"]: row for row in applied.method.layers}
    assert {f"{name}.weight" for name in rows} == set(applied.integers)
    assert all(0 < row["relative_error"] < 0.02 for row in rows.values())
    assert rows["classifier"]["shape"] == [2, 32]
    assert json.dumps(applied.method.layers)
    log = made.log.quantised
    assert (log.scheme, log.bits, log.reduce_range) == ("dynamic-int8", 8, True)
    assert log.tensors == sorted(applied.integers)


def test_the_full_range_is_nearer_and_warns(tmp_path: Path) -> None:
    reduced = contexts.applied(quantize, context_of(tiny.checkpoint("bert"), tmp_path))
    made = tiny.checkpoint("bert")
    full = contexts.applied(quantize, context_of(made, tmp_path, settings={"reduce_range": "false"}))
    assert [w.code for w in full.warnings] == ["saturation"]
    assert full.method.detail["largest_pair_sum"] > 32767
    assert made.log.quantised.reduce_range is False
    for a, b in zip(reduced.method.layers, full.method.layers, strict=True):
        nearer = b["relative_error"] < a["relative_error"]
        assert nearer == (a["kind"] == "matrix")


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("classifier", {"classifier"}),
        ("*.layer.0.*.query", {"bert.encoder.layer.0.attention.self.query"}),
        (
            "*_embeddings",
            {f"bert.embeddings.{part}_embeddings" for part in ("word", "position", "token_type")},
        ),
    ],
)
def test_patterns_keep_layers_in_float(pattern: str, kept: set[str], tmp_path: Path) -> None:
    made, dense = tiny.checkpoint("bert"), tiny.checkpoint("bert").model.state_dict()
    everything = set(contexts.applied(quantize, context_of(tiny.checkpoint("bert"), tmp_path)).integers)
    applied, out = stored(made, tmp_path, keep_fp32=(pattern,))
    assert everything - set(applied.integers) == {f"{name}.weight" for name in kept}
    state = load_file(out / "model.safetensors")
    for name in kept:
        assert torch.equal(state[f"{name}.weight"], dense[f"{name}.weight"])
        assert f"{name}.weight_scale" not in state
    assert torch.equal(logits(checkpoints.load(out).model, "bert"), logits(made.model, "bert"))


def test_embeddings_can_stay_in_float(tmp_path: Path) -> None:
    applied = contexts.applied(quantize, context_of(tiny.checkpoint("bert"), tmp_path, embeddings="fp32"))
    assert not [name for name in applied.integers if "embeddings" in name]
    assert applied.method.params["embeddings"] == "fp32"


def test_relative_position_biases_stay_in_float(tmp_path: Path) -> None:
    made = tiny.checkpoint("mpnet")
    assert any("relative_attention_bias" in name for name in made.model.state_dict())
    assert not [n for n in contexts.applied(quantize, context_of(made, tmp_path)).integers if "relative" in n]


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"scheme": "dynamic-int7"}, {}, "did you mean 'dynamic-int8'"),
        ({"embeddings": "int5"}, {}, "int8"),
        ({"epochs": 1}, {}, "--epochs 1"),
        ({"calibration": "rows.csv"}, {}, "--calibration"),
        ({"keep_fp32": ("encoder.*",)}, {}, r"'encoder\.\*' matches none of the 17"),
        ({"keep_fp32": ("classifier", "pooler")}, {}, "'pooler'"),
        ({"keep_fp32": ("*_embeddings",), "embeddings": "fp32"}, {}, "matches none of the 14"),
        ({"keep_fp32": ("*",)}, {}, "nothing to quantise"),
        ({}, {"bits": "9"}, "bits"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(
    options: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    made = tiny.checkpoint("bert")
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        quantize.prepare(context_of(made, tmp_path, settings=settings, **options))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert made.log.transforms == []


def test_a_pattern_that_matches_nothing_shows_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        quantize.prepare(context_of(tiny.checkpoint("bert"), tmp_path, keep_fp32=("query",)))
    assert "bert.embeddings.word_embeddings" in caught.value.hint
    assert "classifier" in caught.value.hint


def test_a_model_quantised_before_is_quantised_anew(tmp_path: Path) -> None:
    _, out = stored(tiny.checkpoint("bert"), tmp_path)
    loaded = checkpoints.load(out)
    (second := tmp_path / "second").mkdir()
    applied, out = stored(loaded, second, settings={"reduce_range": "false"}, embeddings="fp32")
    quantised = [t for t in applied.checkpoint.log.transforms if isinstance(t, Quantise)]
    assert [t.reduce_range for t in quantised] == [False]
    assert torch.equal(logits(checkpoints.load(out).model, "bert"), logits(loaded.model, "bert"))


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="plain transformers needs compressed-tensors",
)
@pytest.mark.filterwarnings("ignore")  # of two libraries that are not ours
@pytest.mark.parametrize(
    "options", [{}, {"embeddings": "fp32"}, {"keep_fp32": ("*layer.0.*", "classifier*")}], ids=str
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_transformers_loads_the_same_model(family: str, options: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made = tiny.checkpoint(family)
    _, out = stored(made, tmp_path, **options)
    with checkpoints.quiet():
        plain, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        found = logits(plain.eval(), family)
    assert (found - logits(made.model, family)).abs().max() < 1e-5
