"""Few bits, blocks and half precision through the stage: on the disk, reloaded, and read by plain transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcli.context import Context
from kdcli.errors import InputError, UsageError
from kdcli.export import graph as graphs
from kdcli.export import sessions
from kdcli.inputs.feeding import model_inputs
from kdcli.models import activations
from kdcli.models import checkpoint as checkpoints
from kdcli.models.compressed import layouts_of
from kdcli.models.transforms import read_log
from kdcli.progress import Progress
from kdcli.run import dry_run as plan
from kdcli.run import preflight
from kdcli.stages.quantize import integer_weights, layer_inputs
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.rounding import gptq
from kdcli.stages.quantize.schemes import binary
from kdcli.timing import Timings
from tests import tiny
from tests.stages import contexts

CASES = {
    "int4 rtn": ({"scheme": "int4"}, {"rounding": "rtn"}),
    "int4 hqq": ({"scheme": "int4"}, {"rounding": "hqq", "group": "16"}),
    "int4 gptq": ({"scheme": "int4", "calibration_samples": 20}, {"group": "16", "symmetric": "false"}),
    "int4, int8 tables": (
        {"scheme": "int4", "calibration_samples": 20, "embeddings": "int8"},
        {"group": "16"},
    ),
    "int3": ({"scheme": "int4", "embeddings": "int8"}, {"rounding": "rtn", "bits": "3"}),
    "int2 symmetric": (
        {"scheme": "int4", "embeddings": "fp32"},
        {"rounding": "rtn", "bits": "2", "symmetric": "true"},
    ),
    "int8 blocks": ({"scheme": "int4"}, {"rounding": "rtn", "bits": "8"}),
    "dynamic 6 bits": ({}, {"bits": "6"}),
    "dynamic, int4 tables": ({"embeddings": "int4"}, {}),
    "unsigned": ({}, {"unsigned": "true"}),
}


def context_of(made, work: Path, options: dict, settings: dict) -> Context:
    return contexts.of(QuantizeOptions(**options), made, work, settings=settings)


def stored(made, work: Path, options: dict, settings: dict):
    applied = contexts.applied(quantize, context_of(made, work, options, settings))
    (out := work / "out").mkdir()
    checkpoints.save(applied.checkpoint, out, integers=applied.integers, half=applied.half)
    return applied, out


def logits(model, family: str) -> torch.Tensor:
    with torch.no_grad(), activations.paused(model):  # weights alone
        return model(**tiny.batch(family)).logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_on_the_disk_is_the_rounded_model(case: str, tmp_path: Path) -> None:
    options, settings = CASES[case]
    made = tiny.checkpoint("bert")
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    applied, out = stored(made, tmp_path, options, settings)
    log = applied.checkpoint.log.quantised
    assert {name for layout in layouts_of(log) for name in layout.tensors} == set(applied.integers)
    state = load_file(out / "model.safetensors")
    for layout in layouts_of(log):
        for name in layout.tensors:
            values = applied.integers[name].values
            if layout.bits == 8:
                assert state[name].dtype == torch.int8
            else:
                assert name not in state
                words = state[f"{name}_packed"]
                assert words.dtype == torch.int32
                assert words.shape == (len(values), -(-values.shape[1] * layout.bits // 32))
            assert (f"{name}_zero_point" in state) == (not layout.symmetric)
    for name in set(dense) - set(applied.integers):
        assert torch.equal(state[name], dense[name])
    loaded = checkpoints.load(out)
    assert torch.equal(logits(loaded.model, "bert"), logits(made.model, "bert"))
    assert all(row["relative_error"] > 0 for row in applied.method.layers)
    # --dequantize hands the dense model to the next stage, which forgets the integers when it saves.
    (again := tmp_path / "again").mkdir()
    checkpoints.save(loaded, again)
    assert checkpoints.load(again).log.quantised is None
    assert "quantization_config" not in (again / "config.json").read_text(encoding="utf-8")
    assert torch.equal(logits(checkpoints.load(again).model, "bert"), logits(made.model, "bert"))


NEEDS_THE_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@NEEDS_THE_LIBRARY
@pytest.mark.filterwarnings("ignore")  # of two libraries that are not ours
@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_multiplies_out_the_same_weights(case: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    made = tiny.checkpoint("bert")
    applied, out = stored(made, tmp_path, *CASES[case])
    content = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    schemes = QuantizationConfig.model_validate(content).config_groups
    state, found = load_file(out / "model.safetensors"), {}
    for scheme in schemes.values():
        modules = {name.removesuffix(".weight"): name for name in applied.integers}
        kinds = {name: type(made.model.get_submodule(name)).__name__ for name in modules}
        for name in modules:
            if name in scheme.targets or kinds[name] in scheme.targets:
                own = {
                    k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.weight")
                }
                if len(own.get("weight_zero_point", state)) == 1:
                    continue  # compressed-tensors 0.20 cannot view a single row of packed zero points
                compressor = BaseCompressor.get_value_from_registry(scheme.format)
                found[modules[name]] = compressor.decompress(own, scheme)["weight"]
    assert set(applied.integers) - set(found) <= {
        "classifier.weight",
        "bert.embeddings.token_type_embeddings.weight",
    }
    for name, dense in found.items():
        torch.testing.assert_close(dense, applied.integers[name].dense(), rtol=0, atol=1e-6)


@NEEDS_THE_LIBRARY
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["int4, int8 tables", "int2 symmetric", "dynamic 6 bits", "unsigned"])
def test_plain_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    """Of packed tables and packed zero points transformers itself says that it cannot load them."""
    from transformers import AutoModelForSequenceClassification

    made = tiny.checkpoint("bert")
    _, out = stored(made, tmp_path, *CASES[case])
    with checkpoints.quiet():
        plain, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        found = logits(plain.eval(), "bert")
    # The same numbers in another order.
    assert (found - logits(made.model, "bert")).abs().max() < 1e-5


@NEEDS_THE_LIBRARY
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["smoothed", "one bit"])
def test_plain_transformers_refuses_what_it_would_misread(kind: str, tmp_path: Path) -> None:
    """Integers read as weights would give answers without a word."""
    from transformers import AutoModelForSequenceClassification

    made = tiny.checkpoint("bert")
    if kind == "smoothed":
        _, out = stored(made, tmp_path, {}, {"smooth": "0.5"})
    else:
        context = context_of(made, tmp_path, {"scheme": "binary"}, {})
        plan = plans.of(context)
        few = integer_weights.quantise(plan, lambda name, layer: binary.quantise(layer.weight, plan.config))
        (out := tmp_path / "out").mkdir()
        checkpoints.save(made, out, integers=integer_weights.finish(context, plan, few).integers)
    assert torch.equal(logits(checkpoints.load(out).model, "bert"), logits(made.model, "bert"))
    with checkpoints.quiet(), pytest.raises(ValueError, match="format"):
        AutoModelForSequenceClassification.from_pretrained(out)


def test_half_precision_is_dense_and_half_as_large(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    applied, out = stored(made, tmp_path, {"scheme": "fp16"}, {})
    state = load_file(out / "model.safetensors")
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float16} == applied.half
    for name, tensor in state.items():
        assert torch.equal(tensor, dense[name].half() if name in applied.half else dense[name])
    loaded = checkpoints.load(out)
    assert loaded.log.quantised is None  # any stage may follow
    assert torch.equal(logits(loaded.model, "bert"), logits(made.model, "bert"))
    from transformers import AutoModelForSequenceClassification

    with checkpoints.quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    # transformers chooses another attention kernel.
    torch.testing.assert_close(logits(plain.eval(), "bert"), logits(made.model, "bert"), rtol=0, atol=1e-5)


def test_gptq_moves_the_layers_outputs_less_than_rounding_to_the_nearest(tmp_path: Path) -> None:
    errors = {}
    batch = tiny.batch("bert", 40, 7)
    for name in ("rtn", "gptq"):
        made = tiny.checkpoint("bert", layers=1, hidden=64, neurons=96)
        inputs = made.model.bert.encoder.layer[0].intermediate.dense
        seen = []
        handle = inputs.register_forward_pre_hook(lambda module, x, seen=seen: seen.append(x[0]))
        made.model(**batch)
        handle.remove()
        before = inputs.weight.detach().clone()
        options = {"scheme": "int4", "embeddings": "fp32", "calibration_samples": 64}
        contexts.applied(quantize, context_of(made, tmp_path, options, {"rounding": name, "bits": "3"}))
        errors[name] = float((seen[0].detach() @ (before - inputs.weight.detach()).T).norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_gptq_sees_every_layer_behind_the_rounded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is given is X^T X of the model of that moment, tables and earlier layers of it rounded."""
    made = tiny.checkpoint("bert")
    dense = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    options = {"scheme": "int4", "calibration_samples": 20}
    context = context_of(made, tmp_path, options, {"group": "16"})
    original, seen = gptq.quantise, []

    def watched(weight, products, *args, **kwargs):
        (layer,) = [m for m in made.model.modules() if getattr(m, "weight", None) is weight]
        total = torch.zeros_like(products)

        def add(_, inputs) -> None:
            x = inputs[0].flatten(0, -2)
            total.add_(x.T @ x)

        handle = layer.register_forward_pre_hook(add)
        with torch.no_grad():
            for batch in layer_inputs.calibration_batches(context, 20):
                made.model(**model_inputs(made.model, batch, "cpu"))
        handle.remove()
        # float32 sums of at most 280 tokens in another order
        torch.testing.assert_close(products, total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))
        seen.append(layer)
        return original(weight, products, *args, **kwargs)

    monkeypatch.setattr(gptq, "METHOD", replace(gptq.METHOD, of_inputs=watched))
    applied = contexts.applied(quantize, context)
    assert len(seen) == sum(isinstance(m, nn.Linear) for m in made.model.modules()) == 14
    for name, tensor in made.model.state_dict().items():
        if name in applied.integers:
            assert torch.equal(tensor, applied.integers[name].dense())
        else:
            assert torch.equal(tensor, dense[name])
    # The errors in the report are those from the dense weights, not from half-rounded ones.
    for row in applied.method.layers:
        old = dense[f"{row['name']}.weight"]
        now = applied.integers[f"{row['name']}.weight"].dense()
        assert row["relative_error"] == pytest.approx(float((old - now).norm() / old.norm()), rel=1e-4)


@pytest.mark.parametrize(("embeddings", "version"), [(None, "1.23"), ("int8", "1.17")])
def test_plan_report_and_graph_name_the_oldest_onnxruntime(
    embeddings: str | None, version: str, tmp_path: Path
) -> None:
    made = checkpoints.load(tiny.saved(tmp_path / "model", by_kdcli=True))
    options = {"scheme": "int4", "embeddings": embeddings}
    context = context_of(made, tmp_path, options, {"rounding": "rtn"})
    request = dataclasses.replace(
        context.request,
        model=str(tmp_path / "model"),
        common=context.request.common.model_copy(
            update={"data": str(tmp_path / "data"), "out": tmp_path / "not-made"}
        ),
    )
    planned = plan.plan(request, Progress())
    assert planned.facts["onnxruntime"] == f"{version} or newer for model.onnx"
    applied = contexts.applied(quantize, context)
    (out := tmp_path / "out").mkdir()
    checkpoints.save(applied.checkpoint, out, integers=applied.integers)
    built = graphs.build(
        checkpoints.load(out),
        out / "model.onnx",
        context.encoded["test"],
        threads=1,
        timings=Timings(),
        progress=Progress(),
        rewrite=applied.rewrite_onnx,
        attention=applied.fusion,
        exact=applied.exact,
    )
    assert built.detail["oldest_onnxruntime"] == version
    about = sessions.open_session(out / "model.onnx", threads=1).get_modelmeta().custom_metadata_map
    assert about["oldest_onnxruntime"] == version


def test_layers_kept_in_float_stay(tmp_path: Path) -> None:
    for scheme in ("int4", "fp16"):
        made = tiny.checkpoint("bert")
        kept = made.model.classifier.weight.clone()
        (work := tmp_path / scheme).mkdir()
        stored(made, work, {"scheme": scheme, "keep_fp32": ("classifier",)}, {})
        assert torch.equal(made.model.classifier.weight, kept)


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ({"scheme": "int4"}, {"bits": "1"}, UsageError, "bits"),
        ({"scheme": "int4"}, {"group": "48"}, UsageError, "group=48"),
        ({"scheme": "int4"}, {"group": "512"}, UsageError, "group=512"),
        ({"scheme": "int4", "calibration_samples": 0}, {}, UsageError, "must be at least 1"),
        ({"scheme": "int4"}, {"damp": "-1"}, UsageError, "damp"),
        ({"scheme": "int4"}, {"rounding": "hqq", "damp": "1"}, UsageError, "damp"),
        ({"scheme": "int4"}, {"rounding": "up"}, UsageError, "rounding"),
        ({"scheme": "int4", "epochs": 1}, {}, UsageError, "--epochs"),
        ({"scheme": "int4", "embeddings": "fp16"}, {}, UsageError, "no --embeddings fp16"),
        ({"scheme": "fp16", "embeddings": "int8"}, {}, UsageError, "no --embeddings int8"),
        ({"scheme": "fp16"}, {"bits": "4"}, UsageError, "bits"),
        ({"scheme": "auto"}, {"bits": "4"}, UsageError, "'bits': --scheme auto has objective and rows"),
        ({"scheme": "fp16", "sensitivity": True}, {}, UsageError, "--sensitivity has no meaning"),
    ],
)
def test_bad_options_are_refused(options: dict, settings: dict, error, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        quantize.prepare(context_of(tiny.checkpoint("bert"), tmp_path, options, settings))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"version": 1, "tran', "[jJ][sS][oO][nN]"),
        ('{"version": 1, "transforms": [{"op": "melt"}]}', "transforms.0"),
    ],
)
def test_a_broken_log_is_said_to_be_broken(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "kdcli.json").write_text(content)
    with pytest.raises(InputError, match=f"kdcli.json is not a transform log .*: .*{reason}") as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"version": 1, "tran', "Unterminated string.*line 1"),
        ('{"version": 1}', "it has no 'transforms'"),
        ('{"transforms": 3}', "it is not an object with a list of transforms"),
    ],
)
def test_a_broken_log_is_found_before_anything_is_loaded(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "kdcli.json").write_text(content)
    request = context_of(tiny.checkpoint("bert"), tmp_path / "out", {}, {}).request
    with pytest.raises(InputError, match=f"kdcli.json is not a transform log .*: {reason}"):
        preflight.check_chain(request, tmp_path)


def test_a_broken_file_is_said_to_be_broken(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, out = stored(tiny.checkpoint("bert"), tmp_path, {"scheme": "int4"}, {"rounding": "rtn"})
    state = load_file(out / "model.safetensors")
    name = next(n for n in state if n.endswith("_packed"))
    for wrong in ({n: t for n, t in state.items() if n != name}, state | {name: state[name][:, :0]}):
        save_file(wrong, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="no integers with scales"):
            checkpoints.load(out)


def test_only_linear_layers_and_tables_are_touched(tmp_path: Path) -> None:
    made = tiny.checkpoint("mpnet")
    applied, _ = stored(made, tmp_path, {"scheme": "int4"}, {"rounding": "rtn"})
    names = {f"{n}.weight" for n, m in made.model.named_modules() if isinstance(m, nn.Linear)}
    names |= {n for n in made.model.state_dict() if n.endswith("_embeddings.weight")}
    assert set(applied.integers) == names
