"""Sensitivity, the search for layers to keep, and the choice between schemes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from kdcli.errors import UsageError
from kdcli.export import onnx as exporter
from kdcli.inputs import batching
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.measure import environment
from kdcli.models import checkpoint as checkpoints
from kdcli.models.activations import round_fixed, round_rows
from kdcli.progress import Progress
from kdcli.report.schema import Gate
from kdcli.request import Common, Gates, Request
from kdcli.run import life
from kdcli.stages.quantize import auto, single_layers
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.auto import Candidate, Tried
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.simulated import Answers, Simulation, answer
from kdcli.stages.quantize.single_layers import LayerGroup
from kdcli.tasks.multi_label import MultiLabel
from tests import tiny
from tests.report import reports
from tests.stages import contexts
from tests.stages.quantize.test_blocks import context_of


def guarded(
    made, work: Path, *, max_drop: float | None = None, sensitive: bool = False, settings=None, **options
):
    context = context_of(made, work, {"sensitivity": sensitive, **options}, settings or {})
    common = Common(settings=settings or {}, gates=Gates(max_drop=max_drop))
    context.request = Request(stage="quantize", model="m", options=context.request.options, common=common)
    return context, contexts.applied(quantize, context)


def run(kind: str, x: np.ndarray, scale: float | None = None, zero: int | None = None) -> np.ndarray:
    """onnxruntime's own rounding there and back."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", "s", "z"]
    initial = []
    if kind == "QuantizeLinear":
        initial = [
            numpy_helper.from_array(np.float32(scale), "s"),
            numpy_helper.from_array(np.uint8(zero), "z"),
        ]
        nodes = [helper.make_node(kind, names, ["q"])]
    else:
        nodes = [helper.make_node(kind, ["x"], ["q", "s", "z"])]
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    shape = list(x.shape)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initial,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_activations_are_rounded_as_onnxruntime_rounds_them(shift: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 16)).astype(np.float32) + np.float32(shift)
    found = round_rows(torch.from_numpy(x)).numpy()
    for row in range(3):
        want = run("DynamicQuantizeLinear", x[row : row + 1])
        # A quotient at a half may fall on either side: at most one step, and hardly ever.
        step = (max(x[row].max(), 0) - min(x[row].min(), 0)) / 255
        assert np.abs(found[row] - want[0]).max() <= step * 1.001
        assert np.isclose(found[row], want[0], atol=1e-5).mean() > 0.98
    want = run("QuantizeLinear", x, 0.02, 100)
    assert np.isclose(round_fixed(torch.from_numpy(x), 0.02, 100).numpy(), want, atol=1e-5).mean() > 0.999


def test_the_simulation_gives_the_answers_of_the_graph(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    context = context_of(made, tmp_path, {}, {"reduce_range": "false"})
    rows = context.encoded["validation"]
    dense = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    before = answer(made, rows)
    applied = contexts.applied(quantize, context)
    exporter.export(
        made.model,
        TEXT.example(made.config.vocab_size, ["input_ids", "attention_mask"], "cpu"),
        tmp_path / "float.onnx",
    )
    applied.rewrite_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"))
    want = np.concatenate(
        [session.run(None, batching.collate(rows, np.array([i]), made.pad_id))[0] for i in range(len(rows))]
    )
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.copy_(dense[name])
    with Simulation(made, applied.integers, dense, rounds="dynamic") as simulation:
        got = simulation.answers(simulation.layers, rows)
        none = simulation.answers(set(), rows)
    # Rounding moves logits of order 1 by up to 0.16; that the two round alike leaves a tenth of it, from quotients at
    # a half that fall on different sides.
    assert np.abs(got.logits - want).max() < 0.05
    assert np.abs(before.logits - want).max() > np.abs(got.logits - want).max()
    assert np.array_equal(none.logits, before.logits)
    assert np.array_equal(answer(made, rows).logits, before.logits)  # the block left the model in float


def test_padding_does_not_change_what_is_measured(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    rows = context_of(made, tmp_path, {}, {}).encoded["validation"]
    alone = answer(made, rows).logits
    wide = batching.collate(rows, np.arange(len(rows)), made.pad_id)
    with torch.no_grad():
        padded = made.model(**model_inputs(made.model, wide, "cpu")).logits.numpy()
    np.testing.assert_allclose(alone, padded, rtol=0, atol=1e-5)


def test_divergence_is_the_mean_over_rows_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    one, two = (Answers(rng.normal(size=(6, 4)).astype(np.float32), np.zeros(6, int)) for _ in range(2))
    p, q = (np.exp(a.logits) / np.exp(a.logits).sum(1, keepdims=True) for a in (one, two))
    assert one.divergence(two) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert one.divergence(one) == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_query_key_and_value_are_one_unit(family: str) -> None:
    made = tiny.checkpoint(family)
    layers = [n for n, m in made.model.named_modules() if isinstance(m, nn.Linear)]
    found = single_layers.units(made, layers)
    assert sorted(layer for unit in found for layer in unit.layers) == sorted(layers)
    assert [len(unit.layers) for unit in found].count(3) == 2
    assert max(len(unit.layers) for unit in found) == 3


def damaged(made, factor: float = 3000.0) -> None:
    """One outlier in every row of the pooler, which the layer before makes up for: all else there rounds to nothing."""
    norm = made.model.bert.encoder.layer[1].output.LayerNorm
    with torch.no_grad():
        made.model.bert.pooler.dense.weight[:, 0] *= factor
        norm.weight[0] /= factor
        norm.bias[0] /= factor


def test_sensitivity_finds_the_layer_that_cannot_be_rounded(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    damaged(made)
    _, applied = guarded(made, tmp_path, sensitive=True)
    table = applied.method.detail["sensitivity"]
    assert table["rows"] == 32
    units = table["units"]
    assert units[0]["unit"] == "bert.pooler.dense"
    worst = max(units, key=lambda row: row["divergence_one_quantised"])
    assert worst["unit"] == units[0]["unit"]
    assert 0 <= units[0]["divergence_one_kept"] < table["divergence_all_quantised"]
    assert sum(row["layers"] for row in units) == len(applied.integers)


class Fake:
    """A model that loses so much for every unit that is quantised; losses add up."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses, self.asked = losses, 0
        self.layers = list(losses)

    def answers(self, quantised, rows) -> Answers:
        self.asked += 1
        right = round(1000 * (1 - sum(self.losses[layer] for layer in quantised)))
        logits = np.zeros((1000, 2), np.float32)
        logits[:right, 0] = 1
        logits[right:, 1] = 1
        return Answers(logits, np.zeros(1000, int))


def searched(losses: dict[str, float], max_drop: float, order: list[str] | None = None):
    fake = Fake(losses)
    units = [LayerGroup(name, [name]) for name in order or sorted(losses, key=lambda n: -losses[n])]
    base, first = fake.answers([], None), fake.answers(fake.layers, None)
    return single_layers.search(fake, units, None, base, max_drop, first), fake


@pytest.mark.parametrize(
    ("max_drop", "kept"),
    [(0.06, {"a"}), (0.02, {"a", "b"}), (0.01, {"a", "b", "c"}), (0.005, {"a", "b", "c", "d"})],
)
def test_the_search_keeps_as_few_as_will_do(max_drop: float, kept: set[str]) -> None:
    losses = {"a": 0.1, "b": 0.04, "c": 0.01, "d": 0.01, "e": 0.0, "f": 0.0}
    found, fake = searched(losses, max_drop)
    assert found.met
    assert set(found.kept) == kept == found.layers
    assert found.drop <= max_drop + 1e-12
    assert fake.asked < 15


def test_a_wrong_order_is_made_good_by_giving_layers_up_again() -> None:
    losses = {"a": 0.1, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0}
    found, _ = searched(losses, 0.01, order=["b", "c", "a", "d", "e"])
    assert found.kept == ["a"]


def test_where_nothing_is_left_of_a_model_the_search_goes_by_what_each_layer_loses_alone() -> None:
    # "a" alone leaves answers to chance, so keeping any other gains nothing: their order says nothing.
    losses = {"a": 0.5, "b": 0.02, "c": 0.01, "d": 0.0, "e": 0.0}
    units = [
        LayerGroup(name, [name], alone=(losses[name], 1 - losses[name])) for name in ("d", "e", "c", "b", "a")
    ]
    fake = Fake(losses)
    base, first = fake.answers([], None), fake.answers(fake.layers, None)
    found = single_layers.search(fake, units, None, base, 0.015, first)
    assert found.met
    assert found.kept == ["a", "b"]
    # What cannot be met has the best of both orders.
    found = single_layers.search(fake, units, None, base, -0.01, first)
    assert not found.met
    assert sorted(found.kept) == ["a", "b", "c"]
    assert found.drop == pytest.approx(0.0)


def test_what_cannot_be_met_gives_the_best_that_there_is() -> None:
    losses = {"a": 0.05, "b": 0.04, "c": 0.03}
    found, _ = searched(losses, 0.001)
    assert not found.met
    assert found.kept == ["a", "b"]
    assert found.drop == pytest.approx(0.03)


def test_the_allowed_drop_holds_with_few_layers_in_float(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    damaged(made)
    # The labels are what the float model says, so that any changed answer is a loss.
    free_context = context_of(made, tmp_path, {}, {})
    rows = free_context.encoded["validation"]
    rows.labels[:] = answer(made, rows).logits.argmax(1)
    context = context_of(made, tmp_path, {}, {})
    context.encoded = free_context.encoded
    common = Common(gates=Gates(max_drop=0.0))
    context.request = Request(stage="quantize", model="m", options=QuantizeOptions(), common=common)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    applied = contexts.applied(quantize, context)
    detail = applied.method.detail["search"]
    assert detail["drop_all_quantised"] > 0
    assert detail["met"]
    assert "bert.pooler.dense" in detail["kept"]
    assert len(detail["kept"]) <= 3
    kept = set(before) - set(applied.integers)
    for name in kept:
        assert torch.equal(made.model.get_parameter(name), before[name])
    for name, matrix in applied.integers.items():
        assert torch.equal(made.model.get_parameter(name), matrix.dense())
    assert applied.checkpoint.log.quantised.tensors == sorted(applied.integers)


def test_nothing_is_kept_when_nothing_is_lost(tmp_path: Path) -> None:
    made = tiny.checkpoint("bert")
    _, applied = guarded(made, tmp_path, max_drop=0.9)
    assert applied.method.detail["search"]["kept"] == []
    assert len(applied.integers) == 17
    for name, matrix in applied.integers.items():
        assert torch.equal(made.model.get_parameter(name), matrix.dense())


@pytest.mark.parametrize("bits", ["8", "6"])
def test_without_vnni_the_form_that_keeps_more_is_taken(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_vnni", lambda: False)
    _, applied = guarded(tiny.checkpoint("bert"), tmp_path, settings={"bits": bits})
    hardware = applied.method.detail["hardware"]
    assert hardware["vnni"] is False
    assert hardware["isa"] == environment.isa()
    if bits == "6":
        assert "chosen" not in hardware
        return
    scores = hardware["accuracy"]
    assert set(scores) == {"int8, 7 bits", "uint8"}
    assert hardware["chosen"] == ("uint8" if scores["uint8"] > scores["int8, 7 bits"] else "int8, 7 bits")
    assert applied.warnings == []  # neither form can saturate
    # What the user says stands.
    _, applied = guarded(tiny.checkpoint("bert"), tmp_path, settings={"reduce_range": "false"})
    assert "chosen" not in applied.method.detail["hardware"]
    assert [w.code for w in applied.warnings] == ["saturation"]


def test_uint8_wins_where_seven_bits_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_vnni", lambda: False)
    seen = []

    def answers(self, quantised, rows):
        largest = max(int(m.values.int().abs().max()) for m in self.integers.values())
        seen.append(largest)
        right = 32 if largest == 127 else 31
        logits = np.zeros((32, 2), np.float32)
        logits[np.arange(32), rows.labels] = 1
        logits[right:] = -logits[right:]
        return Answers(logits, rows.labels)

    monkeypatch.setattr(Simulation, "answers", answers)
    _, applied = guarded(tiny.checkpoint("bert"), tmp_path)
    assert sorted(seen) == [64, 127]
    assert applied.method.detail["hardware"]["chosen"] == "uint8"
    assert applied.method.detail["largest"] == 127
    assert applied.warnings == []


def tried(name: str, ms: float, size: int, drop: float, passed: bool = True) -> Tried:
    gate = Gate(name="max-drop", expression="drop<=0.01", value=drop, threshold=0.01, passed=passed)
    made = Tried(Candidate(name, "dynamic-int8"), gates=[gate])
    made.measurement, made.delta = reports.measurement(), object()  # type: ignore[assignment]
    made.__class__ = type(
        "Known",
        (Tried,),
        {
            "milliseconds": property(lambda _: ms),
            "bytes": property(lambda _: size),
            "drop": property(lambda _: drop),
        },
    )
    return made


def test_the_fastest_or_smallest_that_passes_is_chosen_and_the_others_are_told_why() -> None:
    a, b = tried("a", 1.0, 100, 0.02, passed=False), tried("b", 2.0, 100, 0.0)
    c, d = tried("c", 2.02, 60, 0.0), tried("d", 5.0, 20, 0.0)
    assert auto.choose([a, b, c, d], "fastest") is c  # as fast as b, and smaller
    assert auto.choose([a, b, c, d], "smallest") is d
    assert "missed drop<=0.01 (it has 0.02)" in auto.why_not(a, c, "fastest")
    assert auto.why_not(b, c, "fastest") == "as fast, but 1.67 times the size"
    assert auto.why_not(d, c, "fastest") == "2.48 times the latency at batch 1"
    assert auto.why_not(c, d, "smallest") == "3.00 times the size"
    # When none passes there is still an output: the one that loses least.
    e, f = tried("e", 1.0, 10, 0.05, passed=False), tried("f", 2.0, 10, 0.03, passed=False)
    assert auto.choose([e, f], "fastest") is f
    assert "loses 5.0 points against 3.0 points" in auto.why_not(e, f, "fastest")
    for one, rmse in ((e, 0.5), (f, 0.25)):  # a number has no points of a hundred
        one.measurement = reports.regression().after
        one.measurement.quality.primary = "rmse"
        one.__class__.drop = property(lambda _, rmse=rmse: rmse)
    assert "loses 0.5 against 0.25" in auto.why_not(e, f, "fastest")
    with pytest.raises(UsageError, match="none of the candidates"):
        auto.choose([Tried(Candidate("g", "fp16"))], "fastest")


def test_auto_measures_every_candidate_and_shows_the_losers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    some = [one for one in auto.CANDIDATES if one.scheme in ("dynamic-int8", "fp16")]
    monkeypatch.setattr(auto, "CANDIDATES", tuple(some))
    source = tiny.saved(tmp_path / "model")
    data = tiny.write_data(tmp_path / "data")
    request = Request(
        stage="quantize",
        model=str(source),
        options=QuantizeOptions(scheme="auto"),
        common=Common(out=tmp_path / "out", data=str(data), settings={"objective": "smallest"}),
    )
    outcome = life.run(request, Progress())
    assert outcome is not None
    report = outcome.report
    assert report.method is not None
    found = report.method.detail["auto"]
    assert found["objective"] == "smallest"
    rows = {row["candidate"]: row for row in found["candidates"]}
    assert set(rows) == {one.name for one in some}
    assert [row["chosen"] for row in rows.values()].count(True) == 1
    smallest = min(rows.values(), key=lambda row: row["onnx_bytes"])
    assert smallest["chosen"]
    assert all(row["reason"] for row in rows.values() if not row["chosen"])
    assert report.method.params["asked"] == "auto"
    assert report.after.size.onnx_bytes == pytest.approx(smallest["onnx_bytes"], rel=0.05)
    assert checkpoints.load(tmp_path / "out").log.quantised.scheme == report.method.name


def test_auto_judges_candidates_by_the_thresholds_that_they_would_ship_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are measured are the ones that decide here, so that table and report say the same."""
    monkeypatch.setattr(auto, "CANDIDATES", (Candidate("fp16", "fp16"),))
    names, rng = ["joy", "anger", "fear"], random.Random(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("validation", 60)):
        rows = [
            {"text": tiny.sentence(rng, i % 2 == 1), "labels": rng.sample(names, i % 3)} for i in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    sure = MultiLabel(thresholds=(0.9999,) * 3)  # which no answer reaches, as of a student of soft answers
    model = tiny.of_task(tmp_path / "model", sure, names)
    request = Request(
        stage="quantize",
        model=str(model),
        options=QuantizeOptions(scheme="auto"),
        common=Common(out=tmp_path / "out", data=str(tmp_path / "data")),
    )
    report = life.run(request, Progress()).report
    (row,) = report.method.detail["auto"]["candidates"]
    assert report.before.quality.main.value == 0
    assert row["micro_f1"] == report.after.quality.main.value > 0.3
    assert abs(row["drop"]) < 0.1  # the input is read at a fitted threshold there, too
