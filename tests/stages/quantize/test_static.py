"""Fixed ranges through the stage: what the graph holds, what onnxruntime makes of it, and smoothing in front."""

from __future__ import annotations

import collections
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.export import fusion, sessions
from kdcli.export import onnx as exporter
from kdcli.families.modules import SmoothLinear
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.models import activations, transforms
from kdcli.models import checkpoint as checkpoints
from kdcli.models.transforms import Cut
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.layer_inputs import observe
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.ranges import Histogram, affine, find_range
from kdcli.stages.quantize.smoothing import smoothquant
from tests import tiny
from tests.models.test_small import made as small
from tests.stages import contexts

# Logits of these models are of order 1; rounding every input and weight of two random layers to 8 bits moves
# one of them by up to 0.12 over all families and rules.
LOGIT_TOLERANCE = 0.25


def context_of(made, work: Path, settings: dict[str, str] | None = None, **options) -> Context:
    options = {"scheme": "static-int8", "calibration_samples": 96} | options
    return contexts.of(QuantizeOptions(**options), made, work, settings=settings)


def batch(made, rows: int = 24) -> dict[str, np.ndarray]:
    family = made.model_type if made.model_type in tiny.FAMILIES else "bert"
    arrays = {name: tensor.numpy() for name, tensor in tiny.batch(family, rows).items()}
    return arrays | {"token_type_ids": np.zeros_like(arrays["input_ids"])}


def graphs(applied, made, work: Path) -> tuple[Path, Path, dict]:
    """The float graph of the reloaded checkpoint, the one that ships, and what its writer says."""
    (out := work / "out").mkdir()
    checkpoints.save(applied.checkpoint, out, integers=applied.integers)
    loaded = checkpoints.load(out)
    names = list(model_inputs(loaded.model, batch(made, 2), "cpu"))
    example = TEXT.example(loaded.config.vocab_size, names, "cpu")
    with activations.paused(loaded.model):
        exporter.export(loaded.model, example, source := work / "float.onnx")
    if applied.fusion != "none" and fusion.possible(source):
        fused = work / "fused.onnx"
        fusion.fuse(source, fused, embeddings=False, attention=applied.fusion)
        source = fused
    detail = applied.rewrite_onnx(source, target := work / "int8.onnx")
    return source, target, detail


def answers(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    run = sessions.runner(sessions.open_session(path, threads=1, spinning=False))
    lengths = arrays["attention_mask"].sum(1)
    return np.concatenate(
        [run({k: v[i : i + 1, :n] for k, v in arrays.items()}) for i, n in enumerate(lengths)]
    )


def executed(path: Path, work: Path) -> collections.Counter[str]:
    """The operators that onnxruntime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(work / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(str(work / "optimised.onnx")).graph.node)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_graph_answers_as_the_float_graph_and_every_product_is_one_of_integers(
    family: str, tmp_path: Path
) -> None:
    made = tiny.checkpoint(family)
    applied = contexts.applied(quantize, context_of(made, tmp_path))
    source, target, detail = graphs(applied, made, tmp_path)
    assert detail["float"] == []
    ran = executed(target, tmp_path)
    # Nothing is multiplied in float, and no weight is multiplied out when a request comes.
    assert not set(ran) & {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "DynamicQuantizeMatMul"} - (
        {"MatMul", "FusedMatMul"} if family == "mpnet" else set()  # its attention is not one operator
    )
    assert ran["DequantizeLinear"] == 0
    assert ran["DynamicQuantizeLinear"] == 0
    matrices = sum(isinstance(m, nn.Linear) for m in made.model.modules())
    attentions = ran["QAttention"]
    assert ran["MatMulIntegerToFloat"] + ran["QGemm"] + 3 * attentions == matrices
    assert attentions == (0 if family == "mpnet" else 2)
    arrays = batch(made)
    want, got = answers(source, arrays), answers(target, arrays)
    assert 0 < np.abs(want - got).max() < LOGIT_TOLERANCE
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.95
    # The reloaded checkpoint rounds as the graph does: only values on the edge of a step differ.
    loaded = checkpoints.load(tmp_path / "out")
    rows = [
        {k: v[i : i + 1, :n] for k, v in arrays.items()}
        for i, n in enumerate(arrays["attention_mask"].sum(1))
    ]
    with torch.no_grad():
        own = [loaded.model(**model_inputs(loaded.model, row, "cpu")).logits.numpy() for row in rows]
    assert np.abs(np.concatenate(own) - got).mean() < 0.3 * np.abs(want - got).mean()


def test_layers_with_equal_weights_have_ranges_of_their_own(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=2)
    first, second = made.model.bert.encoder.layer
    second.load_state_dict(first.state_dict())
    applied = contexts.applied(quantize, context_of(made, tmp_path))
    wanted = applied.checkpoint.log.quantised.activations
    source, target, detail = graphs(applied, made, tmp_path)
    assert detail["float"] == []
    model = onnx.load(str(target))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    rounds = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    found = [(values[n.input[1]].item(), values[n.input[2]].item()) for n in rounds]
    inside = {(round(s, 9), z) for name, (s, z) in wanted.items() if ".layer." in name}
    assert len(inside) == 8  # of each layer: query, key and value together, and three more
    assert {(round(s, 9), z) for s, z in found} >= inside
    arrays = batch(made)
    assert np.abs(answers(source, arrays) - answers(target, arrays)).max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("rule", ["minmax", "percentile", "entropy", "mse"])
def test_ranges_are_those_of_the_rule_on_all_rows_at_once(rule: str, tmp_path: Path) -> None:
    made = tiny.checkpoint("bert", layers=1)
    context = context_of(made, tmp_path, calibration=rule)
    seen: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen[name].append(x[0].flatten()))
        for name, module in made.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    train = context.encoded["train"]
    with torch.no_grad():
        for row in range(len(train)):
            ids = torch.from_numpy(train.ids[train.offsets[row] : train.offsets[row + 1]].astype(np.int64))
            made.model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    applied = contexts.applied(quantize, context)
    log = applied.checkpoint.log.quantised
    assert set(log.activations) == set(seen)
    for name, values in seen.items():
        histogram = Histogram()
        histogram.add(torch.cat(values))
        wanted = affine(*find_range(histogram, rule))
        scale, zero = log.activations[name]
        # sums in another order may push a value over the edge of a bin, and one bin moves an end by 1 / 4096
        assert scale == pytest.approx(wanted.scale, rel=2e-2)
        assert abs(zero - wanted.zero) <= 3


def test_the_answer_does_not_depend_on_other_rows_or_padding(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    _, target, _ = graphs(contexts.applied(quantize, context_of(made, tmp_path)), made, tmp_path)
    arrays = batch(made, 6)
    run = sessions.runner(sessions.open_session(target, threads=1, spinning=False))
    wide = {k: np.pad(v, ((0, 0), (0, 7))) for k, v in arrays.items()}
    # a dynamic range would move every logit by more
    assert np.abs(run(wide) - answers(target, arrays)).max() < 1e-5


def test_a_cnn_runs_with_integer_convolutions(tmp_path: Path) -> None:
    made = small("cnn")
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    applied = contexts.applied(quantize, context_of(made, tmp_path))
    convolutions = [name for name in dense if name.startswith("convolutions.") and name.endswith("weight")]
    for name in convolutions:
        matrix = applied.integers[name]
        assert matrix.values.shape == dense[name].shape
        assert matrix.scale.shape == (len(dense[name]), 1, 1)
        assert float((matrix.dense() - dense[name]).abs().max()) <= 0.501 * float(matrix.scale.max())
    source, target, detail = graphs(applied, made, tmp_path)
    assert detail["float"] == []
    assert detail["int8"]["conv"] == len(convolutions) == 4
    ran = executed(target, tmp_path)
    assert ran["QLinearConv"] == 4
    assert not set(ran) & {"Conv", "FusedConv", "Gemm", "MatMul", "Relu"}
    loaded = checkpoints.load(tmp_path / "out")
    arrays = batch(made)
    with torch.no_grad(), activations.paused(loaded.model):
        want = loaded.model(**model_inputs(loaded.model, arrays, "cpu")).logits.numpy()
    assert np.abs(want - answers(source, arrays)).max() < 1e-4
    got = answers(target, arrays)
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.95
    assert 0 < np.abs(want - got).max() < 0.03 * np.abs(want).max()


def test_kept_layers_stay_float_and_are_named(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    applied = contexts.applied(quantize, context_of(made, tmp_path, keep_fp32=("*.layer.0.*", "classifier")))
    source, target, _ = graphs(applied, made, tmp_path)
    assert not [name for name in applied.checkpoint.log.quantised.activations if ".layer.0." in name]
    ran = executed(target, tmp_path)
    assert (ran["Attention"], ran["QAttention"]) == (1, 1)
    assert ran["MatMul"] == 3
    assert np.abs(answers(source, batch(made)) - answers(target, batch(made))).max() < LOGIT_TOLERANCE


def test_unsigned_weights_give_the_same_answers(tmp_path: Path) -> None:
    found = []
    for number, settings in enumerate(({"reduce_range": "false"}, {"unsigned": "true"})):
        (work := tmp_path / str(number)).mkdir()
        made = tiny.checkpoint("bert")
        applied = contexts.applied(quantize, context_of(made, work, settings))
        assert [w.code for w in applied.warnings] == ([] if number else ["saturation"])
        _, target, detail = graphs(applied, made, work)
        assert detail["float"] == []
        assert executed(target, work)["DequantizeLinear"] == 0
        kinds = {t.data_type for t in onnx.load(str(target)).graph.initializer if t.name.endswith("_int8")}
        assert kinds == {onnx.TensorProto.UINT8 if number else onnx.TensorProto.INT8}
        found.append(answers(target, batch(made)))
    assert np.abs(found[0] - found[1]).max() < 1e-5  # the same integers, shifted by their zero point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "entropic"}, "did you mean 'entropy'"),
        ({"calibration_samples": 0}, "must be at least 1"),
        ({"settings": {"percentile": "99.9"}}, "belongs to --calibration percentile"),
        ({"settings": {"percentile": "101"}, "calibration": "percentile"}, "percentile"),
        ({"epochs": 2}, "--epochs 2"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantize.prepare(context_of(tiny.checkpoint("bert"), tmp_path, **options))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "data", {"train": 1200, "validation": 8})
    made = tiny.checkpoint("bert", layers=1)
    peaks = []
    for rows in (60, 1200):
        context = context_of(made, tmp_path, calibration_samples=rows)
        context.encoded["train"]
        layers = plans.of(context).matrices
        tracemalloc.start()
        found = observe(context, layers, rows, Histogram, Histogram.add)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == len(layers)
    # 1140 more rows of 9 tokens with 6 inputs of 32 floats would be 7 MB; drawing them and their tokens are 0.3 MB.
    assert peaks[1] < peaks[0] + 700_000


SURGERY = ["dense", "emptied", "factorised"]


@pytest.mark.parametrize("case", SURGERY)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_smoothing_leaves_full_precision_as_it_is(family: str, case: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    if case == "emptied":
        transforms.apply(made.model, Cut(heads={0: []}, neurons={1: [0, 5, 7]}))
    elif case == "factorised":
        for part in (made.family.value, made.family.ffn_in):
            pair = transforms.factorise(made.model, f"{made.family.layers}.1.{part}", 9)
            for factor in (pair.first, pair.second):
                nn.init.normal_(factor.weight, std=0.3)
    context = context_of(made, tmp_path)
    arrays = model_inputs(made.model, batch(made), "cpu")
    with torch.no_grad():
        before = made.model(**arrays).logits.clone()
        detail = smoothquant.smooth(context, plans.of(context), 0.5)
        after = made.model(**arrays).logits
    assert (before - after).abs().max() < 1e-5
    assert detail["multiplied"] > 0
    assert detail["folded"] == {"dense": 2, "emptied": 1, "factorised": 1}[case]
    # query, key and value read one tensor and share one vector
    for layer in range(2):
        prefix = f"{made.family.layers}.{layer}.{made.family.attention}"
        shared = [
            module.smooth
            for name, module in made.model.named_modules()
            if isinstance(module, SmoothLinear)
            and name.startswith(prefix)
            and name.split(".")[-1] in ("query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin")
        ]
        assert all(torch.equal(vector, shared[0]) for vector in shared)
    assert made.log.transforms[-1].layers == [
        name for name, module in made.model.named_modules() if isinstance(module, SmoothLinear)
    ]


def outliers(made, factor: float = 12.0) -> None:
    """Make two features of every layer norm but the last much larger, and the columns that read them smaller."""
    with torch.no_grad():
        for name, module in made.model.named_modules():
            if isinstance(module, nn.LayerNorm) and "layer.1.output" not in name:
                module.weight[:2] *= factor
            if isinstance(module, nn.Linear) and {"self", "intermediate"} & set(name.split(".")):
                module.weight[:, :2] /= factor


def test_smoothing_helps_where_features_have_outliers(tmp_path: Path) -> None:
    errors = {}
    for scheme in ("static-int8", "dynamic-int8"):
        for alpha in ("0", "0.5"):
            (work := tmp_path / f"{scheme}-{alpha}").mkdir()
            made = tiny.checkpoint("bert")
            outliers(made)
            with torch.no_grad():
                arrays = batch(made)
                want = made.model(**model_inputs(made.model, arrays, "cpu")).logits.numpy()
            assert want.std(0).min() > 0.02  # a model whose answers differ
            applied = contexts.applied(quantize, context_of(made, work, {"smooth": alpha}, scheme=scheme))
            _, target, detail = graphs(applied, made, work)
            assert detail["float"] == []
            # one multiplication for query, key and value, one for each of the others that are not folded
            muls = executed(target, work)["Mul"]
            assert muls - 3 == (0 if alpha == "0" else 2 * 3 + 2)  # three tables multiply by their scales
            errors[scheme, alpha] = np.abs(answers(target, arrays) - want).mean()
            assert executed(target, work)["QAttention"] == 2
    for scheme in ("static-int8", "dynamic-int8"):
        assert errors[scheme, "0.5"] < 0.7 * errors[scheme, "0"]


def test_smoothed_checkpoints_reload(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    applied = contexts.applied(quantize, context_of(made, tmp_path, {"smooth": "0.5"}))
    _, target, _ = graphs(applied, made, tmp_path)
    loaded = checkpoints.load(tmp_path / "out")
    with torch.no_grad(), activations.paused(loaded.model):
        arrays = model_inputs(made.model, batch(made), "cpu")
        assert torch.equal(loaded.model(**arrays).logits, made.model(**arrays).logits)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(target)).graph.initializer}
    held = sum(a.size for a in stored.values() if a.dtype == np.int8 and a.ndim == 2)
    assert held == sum(m.values.numel() for m in applied.integers.values())
    # quantised once more after --dequantize: the factors of the first time are still in force
    again = contexts.applied(quantize, context_of(loaded, tmp_path, {"smooth": "0.5"}))
    kinds = [transform.op for transform in again.checkpoint.log.transforms]
    assert kinds.count("smooth") == kinds.count("quantise") == 1


def test_other_operators_are_rounded_only_when_asked(tmp_path: Path) -> None:
    errors = {}
    for operators in ("", "layernorm", "gelu", "add", "softmax", "layernorm,gelu,add,softmax"):
        (work := tmp_path / f"x{operators}").mkdir()
        made = tiny.checkpoint("bert")
        applied = contexts.applied(quantize, context_of(made, work, {"operators": operators}))
        source, target, detail = graphs(applied, made, work)
        layers, both = 2, operators.split(",")
        wanted = (1 + 2 * layers) * ("layernorm" in both) + layers * ("gelu" in both)
        # the embeddings are a sum in front of a layer norm too
        wanted += (1 + 2 * layers) * ("add" in both) + layers * ("softmax" in both)
        assert detail["int8"].get("rounded", 0) == wanted
        assert ("attention" in detail["int8"]) == (not operators)
        assert detail["float"] == []
        arrays = batch(made)
        errors[operators] = float(np.abs(answers(source, arrays) - answers(target, arrays)).mean())
    # What a product reads is rounded anyway: the output of GELU twice with one range is as good as once.
    assert errors["gelu"] == pytest.approx(errors[""], rel=0.2)
    assert all(abs(errors[o] / errors[""] - 1) > 0.01 for o in ("layernorm", "add", "softmax"))


def test_an_operator_that_is_misspelled_has_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown operator 'gelo': did you mean 'gelu'"):
        quantize.prepare(context_of(tiny.checkpoint("bert"), tmp_path, {"operators": "add,gelo"}))


@pytest.mark.parametrize("operators", ["relu", "gelu,", "gelu add", ",gelu"])
def test_unknown_operators_are_refused(operators: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="operators"):
        quantize.prepare(context_of(tiny.checkpoint("bert"), tmp_path, {"operators": operators}))
