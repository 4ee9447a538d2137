"""Graphs of other people's, judged: the file that is there, run as its owner runs it, or refused in words."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kdcli.errors import InputError, UsageError
from kdcli.export import onnx as exporter
from kdcli.inputs.text import TEXT
from kdcli.progress import Progress
from kdcli.report import facts, html, markdown
from kdcli.report.schema import Report
from kdcli.request import Common, Request
from kdcli.run import dry_run, life
from kdcli.run.outcome import Outcome
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.prune.options import PruneOptions
from tests import tiny

NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it, without a graph."""
    return tiny.saved(tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture(scope="module")
def graph(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graph, by torch alone: no names or metadata of kdcli's but those of inputs and output."""
    made, path = tiny.checkpoint(), tmp_path_factory.mktemp("graph") / "float.onnx"
    exporter.export(made.model, TEXT.example(made.config.vocab_size, NAMES, "cpu"), path)
    return path


def judge(*names: Path, data: Path, out: Path | None = None, **options) -> Outcome:
    given = EvaluateOptions(models=tuple(str(n) for n in names), batch_sizes=(1,), **options)
    common = Common(data=str(data), out=out)
    return life.run(Request(stage="evaluate", model=None, options=given, common=common), Progress())


def codes(report: Report) -> set[str]:
    """Without what a model of random weights is told of its answers."""
    return {w.code for w in report.warnings} - {"majority", "one-answer"}


def copied(source: Path, target: Path, *, weights: bool = True) -> Path:
    shutil.copytree(source, target)
    if not weights:
        (target / "model.safetensors").unlink()
    return target


def turned(source: Path, target: Path) -> Path:
    """The graph with its head's sign changed: what it answered second it answers first."""
    model = onnx.load(str(source))
    for weight in model.graph.initializer:
        if weight.name.startswith("model.classifier"):
            weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, str(target))
    return target


def by_onnxruntime(graph: Path, home: Path, data: Path) -> float:
    """Accuracy with onnxruntime and the tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer, names = AutoTokenizer.from_pretrained(home), json.loads((home / "config.json").read_text())
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    right = []
    with (data / "test.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            given = tokenizer(row["text"], return_tensors="np", return_token_type_ids=True)
            fed = {i.name: given[i.name].astype(kinds[i.type]) for i in session.get_inputs()}
            answer = session.run(["logits"], fed)[0].argmax()
            right.append(names["id2label"][str(answer)] == row["label"])
    return float(np.mean(right))


def accuracy(report: Report) -> float:
    assert report.after.quality is not None
    return report.after.quality.accuracy.value


def test_the_graph_that_is_there_is_judged(plain: Path, graph: Path, data_dir: Path, tmp_path: Path) -> None:
    exported = judge(plain, data=data_dir).report
    assert exported.after.files is not None
    assert exported.after.files.graph == "export"
    assert "export of model.safetensors" in facts.files_text(exported)
    place = copied(plain, tmp_path / "m")
    bad = turned(graph, place / "model.onnx")
    want = by_onnxruntime(bad, place, data_dir)
    assert want == pytest.approx(1 - accuracy(exported))
    for ref in (place, bad):
        report = judge(ref, data=data_dir).report
        assert accuracy(report) == pytest.approx(want)
        assert "onnx-differs-from-checkpoint" in codes(report)
        assert report.after.files is not None
        assert report.after.files.graph == "model.onnx"
        assert report.after.size.onnx_bytes == bad.stat().st_size
        # Nothing is told of weights that are another model's.
        assert report.after.size.parameters is report.after.compute.macs is None
        for shown in (facts.files_text(report), markdown.table(report), html.page(report)):
            assert "model.onnx" in shown
            assert "0 of 40 rows" in shown
    torch_report = judge(place, data=data_dir, runtime="torch").report
    assert accuracy(torch_report) == accuracy(exported)
    assert torch_report.after.files is not None
    assert torch_report.after.files.quality == "torch"
    assert any("quality here is that of the checkpoint" in w.message for w in torch_report.warnings)
    out = judge(place, data=data_dir, out=tmp_path / "out").path
    assert (out / "model.onnx").read_bytes() == bad.read_bytes()


def test_a_graph_that_agrees_is_judged_without_a_warning(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m")
    shutil.copyfile(graph, place / "model.onnx")
    report = judge(place, data=data_dir).report
    assert codes(report) == set()
    assert report.method is not None
    assert report.method.detail["checkpoint"]["same"] == 40
    assert report.method.detail["checkpoint"]["largest"] < 1e-5  # float32 on both sides
    assert report.after.size.parameters
    assert report.after.compute.macs


def test_no_weights_are_needed(plain: Path, graph: Path, data_dir: Path, tmp_path: Path) -> None:
    place = copied(plain, tmp_path / "m", weights=False)
    shutil.copyfile(graph, place / "model.onnx")
    (place / "pytorch_model.bin").write_bytes(b"not read")
    report = judge(place, data=data_dir).report
    assert accuracy(report) == pytest.approx(by_onnxruntime(graph, place, data_dir))
    size = report.after.size
    assert size.parameters is size.nonzero_parameters is size.checkpoint_bytes is None
    assert report.after.compute.macs is None
    assert codes(report) == set()
    options = EvaluateOptions(models=(str(place),))
    request = Request(stage="evaluate", model=None, options=options, common=Common(data=str(data_dir)))
    assert dry_run.plan(request, Progress()).facts["labels"] == 2
    with pytest.raises(UsageError, match="by its graph alone"):
        judge(place, data=data_dir, runtime="both")
    out = judge(place, data=data_dir, out=tmp_path / "out").path
    assert sorted(p.name for p in out.iterdir() if p.suffix in (".bin", ".onnx", ".safetensors")) == [
        "model.onnx"
    ]
    # The one graph there is needs no name; of several one has to be named.
    (place / "model.onnx").rename(place / "model_quantized.onnx")
    assert accuracy(judge(place, data=data_dir).report) == accuracy(report)
    shutil.copyfile(graph, place / "model_b.onnx")
    with pytest.raises(InputError, match="several graphs"):
        judge(place, data=data_dir)


def test_hub_layout_and_a_graph_alone(plain: Path, graph: Path, data_dir: Path, tmp_path: Path) -> None:
    place = copied(plain, tmp_path / "m")
    (place / "onnx").mkdir()
    shutil.copyfile(graph, place / "onnx" / "model.onnx")
    turned(graph, place / "onnx" / "model_b.onnx")
    want = by_onnxruntime(graph, place, data_dir)
    for ref in (place, place / "onnx" / "model.onnx"):
        report = judge(ref, data=data_dir).report
        assert report.after.files is not None
        assert report.after.files.graph == "onnx/model.onnx"
        assert accuracy(report) == pytest.approx(want)
    other = judge(place / "onnx" / "model_b.onnx", data=data_dir)
    assert accuracy(other.report) == pytest.approx(1 - want)
    assert other.path == place / "onnx" / "model_b.onnx"  # and not the directory, whose graph is another one
    (tmp_path / "alone").mkdir()
    shutil.copyfile(graph, tmp_path / "alone" / "x.onnx")
    with pytest.raises(InputError, match=r"no config\.json"):
        judge(tmp_path / "alone" / "x.onnx", data=data_dir)
    shutil.copyfile(plain / "config.json", tmp_path / "alone" / "config.json")
    with pytest.raises(InputError, match="no tokenizer"):
        judge(tmp_path / "alone" / "x.onnx", data=data_dir)
    with pytest.raises(InputError, match="there is no file"):
        judge(tmp_path / "none.onnx", data=data_dir)


def test_a_graph_that_was_not_judged_is_named(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m")
    turned(graph, place / "model_quantized.onnx")
    report = judge(place, data=data_dir).report
    assert codes(report) == {"onnx-not-judged"}
    assert accuracy(report) == pytest.approx(by_onnxruntime(graph, place, data_dir))


def test_a_named_graph_needs_no_checkpoint_that_can_be_read(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m")
    shutil.copyfile(graph, place / "model.onnx")
    (place / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="not a safetensors file"):
        judge(place, data=data_dir)
    report = judge(place / "model.onnx", data=data_dir).report
    assert codes(report) == {"onnx-not-compared"}
    assert accuracy(report) == pytest.approx(by_onnxruntime(graph, place, data_dir))


def ints(model: onnx.ModelProto) -> None:
    """32-bit ids and a float mask, as other exporters have them."""
    for value in model.graph.input:
        name, kind = value.name, TensorProto.FLOAT if value.name == "attention_mask" else TensorProto.INT32
        value.type.tensor_type.elem_type = kind
        for node in model.graph.node:
            for i, given in enumerate(node.input):
                if given == name:
                    node.input[i] = f"{name}_64"
        model.graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}_64"], to=TensorProto.INT64))


def no_types(model: onnx.ModelProto) -> None:
    """Segment ids made inside."""
    value = next(v for v in model.graph.input if v.name == "token_type_ids")
    model.graph.input.remove(value)
    zero = numpy_helper.from_array(np.array([0], dtype=np.int64), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.insert(0, helper.make_node("Mul", ["input_ids", "zero"], ["token_type_ids"]))


def more_outputs(model: onnx.ModelProto) -> None:
    """A second output of the same form before the logits."""
    model.graph.node.append(helper.make_node("Neg", ["logits"], ["negative"]))
    out = helper.make_tensor_value_info("negative", TensorProto.FLOAT, ["batch", 2])
    first = model.graph.output[0]
    del model.graph.output[:]
    model.graph.output.extend([out, first])


def external(model: onnx.ModelProto) -> None:
    """Weights beside the graph."""
    from onnx.external_data_helper import convert_model_to_external_data

    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)


@pytest.mark.parametrize("change", [ints, no_types, more_outputs, external])
def test_graphs_of_other_forms_are_run_rightly(
    change: Callable[[onnx.ModelProto], None], plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m")
    model = onnx.load(str(graph))
    change(model)
    onnx.save(model, str(place / "model.onnx"))
    report = judge(place, data=data_dir, out=tmp_path / "out").report
    assert accuracy(report) == pytest.approx(by_onnxruntime(place / "model.onnx", place, data_dir))
    assert accuracy(report) == accuracy(judge(graph_home(plain, graph, tmp_path), data=data_dir).report)
    assert "onnx-differs-from-checkpoint" not in codes(report)
    # What was copied runs by itself, and its size is that of all its files.
    assert by_onnxruntime(tmp_path / "out" / "model.onnx", place, data_dir) == pytest.approx(accuracy(report))
    written = sum(
        p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name in ("model.onnx", "weights.bin")
    )
    assert report.after.size.onnx_bytes == written


def graph_home(plain: Path, graph: Path, tmp_path: Path) -> Path:
    place = copied(plain, tmp_path / "unchanged")
    shutil.copyfile(graph, place / "model.onnx")
    return place


def test_other_weights_beside_the_same_graph_are_other_answers(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m", weights=False)
    values = {}
    for name, source in (("right", graph), ("wrong", turned(graph, tmp_path / "turned.onnx"))):
        model = onnx.load(str(source))
        external(model)
        onnx.save(model, str(place / "model.onnx"))  # the same bytes both times: the weights are elsewhere
        values[name] = accuracy(judge(place, data=data_dir).report)
    assert values["wrong"] == pytest.approx(1 - values["right"])


def test_probabilities_are_calibrated_as_what_they_are(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    want = judge(graph_home(plain, graph, tmp_path), data=data_dir).report
    place = copied(plain, tmp_path / "m")
    model = onnx.load(str(graph))
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2]))
    onnx.save(model, str(place / "model.onnx"))
    report = judge(place, data=data_dir).report
    assert report.after.quality is not None
    assert want.after.quality is not None
    # The same float32 softmax on both sides; a softmax of a softmax gives another number.
    assert report.after.quality.ece.value == pytest.approx(want.after.quality.ece.value, abs=1e-6)
    assert codes(report) == set()


def positions(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"])
    model.graph.input.append(value)


def fixed(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 16


def one_row(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def sigmoid(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["scores"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2]))


def encoder(model: onnx.ModelProto) -> None:
    hidden = next(n for n in model.graph.node if n.op_type == "LayerNormalization").output[0]
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info(hidden, TensorProto.FLOAT, ["batch", "sequence", 32])
    )


def two_answers(model: onnx.ModelProto) -> None:
    more_outputs(model)
    model.graph.output[1].name = "z"
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["z"]))


def no_ids(model: onnx.ModelProto) -> None:
    del model.graph.node[:], model.graph.input[:], model.graph.output[:]
    model.graph.input.append(
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "s"])
    )
    model.graph.node.append(helper.make_node("Cast", ["attention_mask"], ["y"], to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "s"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (positions, "asks for the input 'position_ids'"),
        (fixed, "fixed sequence of 16"),
        (one_row, "fixed batch of 1"),
        (sigmoid, "ends in a sigmoid"),
        (encoder, "no output has a number for every label"),
        (two_answers, "several outputs"),
        (no_ids, "no input 'input_ids'"),
    ],
)
def test_graphs_that_cannot_be_judged_are_refused(
    change: Callable[[onnx.ModelProto], None],
    words: str,
    plain: Path,
    graph: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    place = copied(plain, tmp_path / "m")
    model = onnx.load(str(graph))
    change(model)
    onnx.save(model, str(place / "model.onnx"))
    with pytest.raises(InputError, match=words):
        judge(place, data=data_dir)


def test_a_graph_of_another_model_is_refused(plain: Path, data_dir: Path, tmp_path: Path) -> None:
    place = copied(plain, tmp_path / "m", weights=False)
    small = tiny.checkpoint()
    with torch.no_grad():  # fewer token rows than the tokenizer has tokens, and three labels
        words = small.model.bert.embeddings.word_embeddings
        words.weight = torch.nn.Parameter(words.weight[:12].clone())
    exporter.export(small.model, TEXT.example(12, NAMES, "cpu"), place / "model.onnx")
    with pytest.raises(InputError, match="stops on"):
        judge(place, data=data_dir)
    three = tiny.checkpoint()
    three.model.classifier = torch.nn.Linear(32, 3)
    exporter.export(three.model, TEXT.example(three.config.vocab_size, NAMES, "cpu"), place / "model.onnx")
    with pytest.raises(InputError, match="3 numbers a row, but its configuration names 2 labels"):
        judge(place, data=data_dir)
    (place / "model.onnx").write_bytes(b"\x08\x07" + b"garbage" * 50)
    with pytest.raises(InputError, match=r"not an ONNX graph|cannot open"):
        judge(place, data=data_dir)


def test_labels_come_from_the_configuration_and_must_be_those_of_the_graph(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m", weights=False)
    shutil.copyfile(graph, place / "model.onnx")
    config = json.loads((place / "config.json").read_text())
    first = accuracy(judge(place, data=data_dir).report)
    names = ["positive", "negative"]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (place / "config.json").write_text(json.dumps(config))
    assert accuracy(judge(place, data=data_dir).report) == pytest.approx(1 - first)
    exporter.annotate(place / "model.onnx", tiny.LABELS, {})
    with pytest.raises(InputError, match="says that its labels are negative, positive"):
        judge(place, data=data_dir)
    del config["id2label"], config["label2id"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names no labels"):
        judge(place, data=data_dir)


def test_weights_outside_the_directory_are_not_read(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = copied(plain, tmp_path / "m")
    model = onnx.load(str(graph))
    external(model)
    onnx.save(model, str(place / "model.onnx"))
    (place / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(InputError, match=r"'weights\.bin', which is missing"):
        judge(place, data=data_dir)
    moved = onnx.load(str(place / "model.onnx"), load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    onnx.save(moved, str(place / "model.onnx"))
    with pytest.raises(InputError, match="outside its directory"):
        judge(place, data=data_dir)


def prune(model: Path, out: Path, data: Path) -> Report:
    options = PruneOptions(sparsity=0.4, method="taylor", schedule="one-shot")
    request = Request(
        stage="prune", model=str(model), options=options, common=Common(out=out, data=str(data))
    )
    outcome = life.run(request, Progress())
    assert outcome is not None
    return outcome.report


def test_a_stage_measures_the_checkpoint_it_works_on(
    plain: Path, graph: Path, data_dir: Path, tmp_path: Path
) -> None:
    want = prune(plain, tmp_path / "want", data_dir)
    place = copied(plain, tmp_path / "m")
    turned(graph, place / "model.onnx")
    report = prune(place, tmp_path / "out", data_dir)
    assert want.before is not None
    assert report.before is not None
    assert report.before.quality == want.before.quality
    assert "onnx-differs-from-checkpoint" in codes(report)
    assert "onnx-differs-from-checkpoint" not in codes(want)
    # One of kdcli's own outputs whose graph somebody has replaced.
    again = prune(tmp_path / "want", tmp_path / "again", data_dir)
    assert again.before is not None
    assert again.before.files is not None
    assert again.before.files.graph == "model.onnx"
    turned(graph, tmp_path / "want" / "model.onnx")
    report = prune(tmp_path / "want", tmp_path / "third", data_dir)
    assert report.before is not None
    assert report.before.quality == again.before.quality
    assert "onnx-differs-from-checkpoint" in codes(report)
    (place / "model.onnx").write_bytes(b"broken")
    assert "onnx-not-compared" in codes(prune(place, tmp_path / "fourth", data_dir))
