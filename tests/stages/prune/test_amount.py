"""How much is pruned: a target speed-up, a drop that may not be passed, a schedule while training."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdcli import families, tasks
from kdcli.errors import InputError, InterruptedRun, UsageError
from kdcli.families.stack import encoder_layers
from kdcli.models import checkpoint as checkpoints
from kdcli.models.transforms import Zero
from kdcli.probe import layer_clock, speedup
from kdcli.probe.speedup import Speed
from kdcli.progress import Progress
from kdcli.request import Gates
from kdcli.stages.prune import combined, gradual, search, speed
from kdcli.stages.prune import plan as plans
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.budget import costs, layer_macs
from tests import tiny
from tests.stages import contexts
from tests.stages.prune.test_stage import TOLERANCE, context_of, encoder_weights, logits, masked_logits

REST, OVERHEAD, HEAD, NEURON = 0.4, 0.03, 0.05, 0.002  # milliseconds of the machine that the tests imagine


def clock(stacks: Sequence[nn.Module], tokens: int, progress: Progress) -> list[float]:
    """A machine on which every layer costs what it should."""
    assert tokens == 10  # the mean of the rows of the test below
    return [time_of(one) for one in stacks]


def time_of(model: nn.Module) -> float:
    layers = encoder_layers(model, families.of(str(model.config.model_type)))
    parts = [(x.heads, HEAD) for x in layers] + [(x.neurons, NEURON) for x in layers]
    return REST + sum(OVERHEAD + n * cost for n, cost in parts if n)


def loaded(folder: Path, family: str = "bert", **sizes: int):
    if not (folder / "config.json").exists():
        tiny.saved(folder, family, **sizes)
    return checkpoints.load(folder)


def deep(tmp_path: Path, **options):
    made = loaded(tmp_path / "model", layers=3, heads=4, neurons=48)
    return by_taylor(made, tmp_path, **options)


def by_taylor(made, work: Path, **options):
    """A context whose heads and neurons are judged by the quickest method that reads rows."""
    units = options.get("structure", "heads+neurons") in plans.UNITS
    return context_of(made, work, **({"method": "taylor"} if units else {}), **options)


# --- a stack of layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_stack_is_one_layer_over_and_over(family: str) -> None:
    made = tiny.checkpoint(family, layers=3)
    before = logits(made.model, family)
    small = layer_clock.stack(
        made.model,
        made.family,
        [1, 1, 1, 0],
        lambda layer: (layer.keep_heads([0, 2]), layer.keep_neurons(range(7))),
    )
    layers = encoder_layers(small, made.family)
    source = encoder_layers(made.model, made.family)[1]
    assert [(x.heads, x.neurons) for x in layers] == [(2, 7)] * 4
    for layer in layers[:3]:
        assert torch.equal(layer.ffn_in.weight, source.ffn_in.weight[:7])
    table = small.get_input_embeddings()
    assert table.num_embeddings < made.model.get_input_embeddings().num_embeddings
    assert torch.equal(logits(made.model, family), before)
    ids = torch.full((1, 5), int(made.config.pad_token_id) + 1)
    assert torch.isfinite(small(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_stacks_are_timed_once_and_more_layers_take_longer(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=2, hidden=64, neurons=512)
    asked = []

    def make(neurons: int):
        def stack() -> nn.Module:
            asked.append(neurons)
            return layer_clock.stack(
                made.model, made.family, [0, 0], lambda layer: layer.keep_neurons(range(neurons))
            )

        return stack

    stacks = {"0 neurons": make(0), "512 neurons": make(512)}
    first = layer_clock.milliseconds("tiny", stacks, 32, progress=Progress(), threads=1)
    again = layer_clock.milliseconds("tiny", stacks, 32, progress=Progress(), threads=1)
    assert asked == [0, 512]
    assert first == again
    # 2 * 32 * 64 * 512 multiply-accumulates a layer: more than the noise of the quietest of five rounds.
    assert 0 < first["0 neurons"] < first["512 neurons"]


# --- --target-speedup ----------------------------------------------------------------------------


def test_the_table_gives_back_what_was_measured(tmp_path: Path) -> None:
    context = deep(tmp_path, target_speedup=1.5)
    table = speed.table(context, timer=clock)
    assert table.rest == pytest.approx(REST)
    layers = encoder_layers(context.checkpoint.model, context.checkpoint.family)
    assert table.total(layers) == pytest.approx(time_of(context.checkpoint.model))
    layers[0].keep_heads([1])
    layers[1].keep_neurons([])
    layers[2].keep_neurons(range(20))
    # Sizes in between are exact too, because this machine is linear; below the fewest measured it is not asked.
    assert table.total(layers) == pytest.approx(time_of(context.checkpoint.model))

    def broken(*_: object) -> list[float]:
        raise AssertionError("the table is in the cache")

    assert speed.table(deep(tmp_path), timer=broken) == table


@pytest.mark.parametrize("target", [1.2, 1.6, 2.2])
def test_a_target_is_met_by_the_table(target: float, tmp_path: Path) -> None:
    context = deep(tmp_path, target_speedup=target)
    plan = plans.check(context.request)
    dense = time_of(context.checkpoint.model)

    def measure(_, checkpoint) -> Speed:
        return Speed(dense / time_of(checkpoint.model), 0.0)

    applied = speed.apply(context, plan, timer=clock, measure=measure)
    detail = applied.method.detail["target_speedup"]
    reached = dense / time_of(applied.checkpoint.model)
    # A head is 0.05 of 1.5 ms, and an emptied sub-layer saves 0.03 ms more than its units.
    assert target * 0.98 <= reached <= target * 1.1
    assert detail["tries"][-1]["predicted"] == pytest.approx(reached)
    assert detail["measured"] == pytest.approx(reached)
    assert applied.warnings == []
    assert applied.method.params["target_speedup"] == target
    again = tiny.reload(applied.checkpoint, tmp_path / "out")
    assert torch.equal(logits(again.model, "bert"), logits(applied.checkpoint.model, "bert"))


def test_a_missed_target_is_corrected_from_the_dense_model(tmp_path: Path) -> None:
    """A machine on which cutting saves only 0.8 of what the table says."""
    context = deep(tmp_path, target_speedup=1.5)
    dense, seen = time_of(context.checkpoint.model), []

    def measure(_, checkpoint) -> Speed:
        seen.append(checkpoint)
        return Speed(dense / (dense - 0.8 * (dense - time_of(checkpoint.model))), 0.01)

    applied = speed.apply(context, plans.check(context.request), timer=clock, measure=measure)
    detail = applied.method.detail["target_speedup"]
    first, last = detail["tries"][0], detail["tries"][-1]
    assert first["measured"] < 1.45 <= last["measured"]
    assert first["predicted"] < last["predicted"]
    assert first["macs_kept"] > last["macs_kept"]
    assert len(seen) == len({id(x) for x in seen}) == len(detail["tries"]) <= 3
    assert applied.checkpoint is seen[-1]
    assert len(applied.checkpoint.log.transforms) == 1
    assert applied.warnings == []


def test_a_target_out_of_reach_is_refused_or_said(tmp_path: Path) -> None:
    context = deep(tmp_path, target_speedup=50.0)
    with pytest.raises(UsageError, match=r"cannot be met by removing heads\+neurons.* is the most"):
        speed.check(context, plans.check(context.request), timer=clock)
    context = deep(tmp_path, target_speedup=1.5)
    stubborn = speed.apply(
        context, plans.check(context.request), timer=clock, measure=lambda *_: Speed(1.1, 0.01)
    )
    assert [w.code for w in stubborn.warnings] == ["speedup-missed"]
    assert len(stubborn.method.detail["target_speedup"]["tries"]) == 3


def test_the_slowest_of_those_that_meet_the_target_is_kept(tmp_path: Path) -> None:
    context = deep(tmp_path, target_speedup=1.5)
    context.checkpoint.task = tasks.judged_by(context.checkpoint.task, "macro_f1")  # --metric
    answers = iter([Speed(1.9, 0.0), Speed(1.4, 0.0), Speed(1.75, 0.0)])
    applied = speed.apply(
        context, plans.check(context.request), timer=clock, measure=lambda *_: next(answers)
    )
    assert applied.method.detail["target_speedup"]["measured"] == 1.75
    assert applied.checkpoint.task.primary == "macro_f1"


def test_a_resumed_recovery_belongs_to_the_cut_that_was_measured_then(tmp_path: Path) -> None:
    options = {"target_speedup": 1.5, "epochs": 1, "batch_size": 16, "lr": 1e-3}
    dense = time_of(loaded(tmp_path / "model", layers=3, heads=4, neurons=48).model)

    def honest(_, checkpoint) -> Speed:
        return Speed(dense / time_of(checkpoint.model), 0.0)

    def apply(folder: str, measure, stop: int = 0, resume: bool = False):
        context = deep(tmp_path, **options)
        context.resume_dir = tmp_path / folder
        common = context.request.common.model_copy(update={"resume": resume})
        context.request = replace(context.request, common=common)
        if stop:
            context.progress = _Stop(stop)
        return speed.apply(context, plans.check(context.request), timer=clock, measure=measure)

    straight = apply("a", honest)
    with pytest.raises(InterruptedRun):
        apply("b", honest, stop=2)
    later = apply("b", lambda *_: Speed(1.1, 0.0), resume=True)  # a slower minute of the machine
    state, other = straight.checkpoint.model.state_dict(), later.checkpoint.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert later.method.detail["target_speedup"] == straight.method.detail["target_speedup"]


def test_the_real_model_is_measured_against_its_input(tmp_path: Path) -> None:
    made = loaded(tmp_path / "model", layers=4, hidden=64, neurons=1024)
    context = context_of(made, tmp_path)
    other = checkpoints.load(tmp_path / "model")
    for layer in encoder_layers(other.model, other.family):
        layer.keep_heads([0])
        layer.keep_neurons([])
    found = speedup.against_input(context, other)
    assert found.value > 1.2  # four layers of one head against four of four and 1024 neurons
    assert 0 <= found.noise < found.value


def test_a_step_in_the_time_is_approached_from_both_sides() -> None:
    def row(share: float, measured: float) -> dict:
        return {"share_of_time": share, "predicted": 1 / share, "measured": measured}

    # As MiniLM measured: 1.86 and 1.37 where 1.6 was wanted.
    tries = [row(0.625, 1.86), row(0.716, 1.37)]
    found = speedup.corrected(tries, 1.6)
    assert 0.625 < found < 0.716
    assert found == pytest.approx(np.interp(1 / 1.6, [1 / 1.86, 1 / 1.37], [0.625, 0.716]))
    assert speedup.corrected(tries[:1], 1.6) > 0.625
    assert speedup.corrected(tries[1:], 1.6) < 0.716
    # A time that falls when less is cut is noise, and no line goes through it.
    assert 0 <= speedup.corrected([row(0.7, 1.9), row(0.6, 1.3)], 1.6) < 0.6


def test_noise_is_the_standard_error_where_whole_rounds_are_disturbed() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(1, 2, 64)  # texts of other lengths take other times

    def times(milliseconds: float) -> np.ndarray:
        rounds = np.exp(rng.normal(0, 0.08, (7, 1)))  # as measured on a shared machine
        return milliseconds * rows * rounds * np.exp(rng.normal(0, 0.05, (7, 64)))

    estimates = [speedup.speed_of(times(2.0), times(1.0)) for _ in range(1000)]
    found = np.array([one.value for one in estimates])
    assert np.median(found) == pytest.approx(2.0, rel=0.02)
    # 3 % apart: rows differ so much that the pooled median is hardly rougher than the mean over rounds.
    assert np.mean([one.noise for one in estimates]) == pytest.approx(found.std(), rel=0.1)


# --- --max-drop ----------------------------------------------------------------------------------


def searched(context, max_drop: float):
    gates = Gates().model_copy(update={"max_drop": max_drop})  # also one that no option allows
    common = context.request.common.model_copy(update={"gates": gates})
    context.request = replace(context.request, common=common)
    return context


@pytest.mark.parametrize("structure", ["heads+neurons", "weights"])
def test_search_returns_the_smallest_model_that_keeps_the_drop(
    structure: str, tmp_path: Path, monkeypatch
) -> None:
    """Accuracy is made up: it falls with what is gone of the encoder's weights, and costs nothing to try."""
    settings = {"steps": "1"} if structure != "weights" else {}
    context = searched(deep(tmp_path, structure=structure, settings=settings), 0.25)

    def left(checkpoint) -> float:
        return sum(int((w != 0).sum()) for w in encoder_weights(checkpoint.model))

    whole = left(context.checkpoint)
    monkeypatch.setattr(search, "score", lambda context: left(context.checkpoint) / whole)
    applied = contexts.applied(prune, context)
    rows = applied.method.detail["search"]["tries"]
    assert len(rows) == search.TRIES
    keeping = [row for row in rows if row["drop"] <= 0.25]
    best = max(keeping, key=lambda row: row["sparsity"])
    assert applied.method.params["sparsity"] == best["sparsity"]
    assert applied.method.params["max_drop"] == 0.25
    assert 1 - left(applied.checkpoint) / whole == pytest.approx(best["drop"])
    assert 0.2 < best["drop"] <= 0.25
    assert all(row["kept"] == (row["drop"] <= 0.25) for row in rows)
    assert len(applied.checkpoint.log.transforms) == 1  # cut once, from the dense model
    assert {w.code for w in applied.warnings} == ({"zeros-not-smaller"} if structure == "weights" else set())
    again = tiny.reload(applied.checkpoint, tmp_path / "out")
    assert torch.equal(logits(again.model, "bert"), logits(applied.checkpoint.model, "bert"))


def test_search_goes_over_layers_too(tmp_path: Path, monkeypatch) -> None:
    made = loaded(tmp_path / "model", layers=4)
    context = searched(context_of(made, tmp_path, structure="layers", settings={"samples": "16"}), 0.6)
    made.task = tasks.judged_by(made.task, "macro_f1")  # --metric, which no file of the input has

    def layers(context) -> int:
        return len(encoder_layers(context.checkpoint.model, context.checkpoint.family))

    monkeypatch.setattr(search, "score", lambda context: layers(context) / 4)
    applied = contexts.applied(prune, context)
    assert len(encoder_layers(applied.checkpoint.model, applied.checkpoint.family)) == 2
    assert applied.checkpoint.task.primary == "macro_f1"
    assert applied.method.params["sparsity"] == pytest.approx(0.6, abs=0.1)
    assert len(applied.method.detail["search"]["tries"]) == search.TRIES
    plan = combined.check(searched(context_of(made, tmp_path, structure="layers", sparsity=0.5), 0.6).request)
    assert plan.max_drop is None


def test_search_measures_on_validation_and_warns_when_nothing_holds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(search, "TRIES", 2)
    monkeypatch.setattr(
        search.bisection, "keeps", lambda drop, limit: False
    )  # even the dense model drops by 0
    context = searched(deep(tmp_path, settings={"steps": "1"}), 0.0)
    applied = contexts.applied(prune, context)
    assert [w.code for w in applied.warnings] == ["max-drop-missed"]
    detail = applied.method.detail["search"]
    assert (detail["split"], detail["rows"]) == ("validation", 24)
    rows = context.encoded["validation"]
    right = 0
    with torch.no_grad():
        for i in range(len(rows)):
            ids = torch.from_numpy(rows.take([i]).ids.astype(np.int64))[None]
            right += int(applied.checkpoint.model(input_ids=ids).logits.argmax()) == rows.labels[i]
    chosen = min(detail["tries"], key=lambda row: row["drop"])
    assert chosen["accuracy"] == pytest.approx(right / 24)
    context.encoded = {**context.encoded, "validation": replace(rows, labels=None)}
    with pytest.raises(InputError, match="no label"):
        contexts.applied(prune, context)


def test_a_share_makes_max_drop_a_gate_only(tmp_path: Path) -> None:
    context = searched(deep(tmp_path, sparsity=0.3), 0.1)
    plan = plans.check(context.request)
    assert (plan.sparsity, plan.max_drop) == (0.3, None)
    assert plans.check(searched(deep(tmp_path, budget=0.5), 0.1).request).max_drop is None
    assert plans.check(searched(deep(tmp_path), 0.1).request).max_drop == 0.1


# --- --schedule gradual --------------------------------------------------------------------------


def test_cubic_schedule() -> None:
    for steps in (1, 2, 5, 12, 100):
        when = gradual.cuts(steps)
        assert list(when.values()) == sorted(when.values())
        assert max(when.values()) == 1.0
        assert max(when) <= max(1, round(steps * 2 / 3))
    # Zhu and Gupta's formula from 0 to s_f = 1, at the eighths of two thirds of the steps.
    when = gradual.cuts(96)
    assert when == {8 * k: pytest.approx(1 - (1 - k / 8) ** 3) for k in range(1, 9)}


GRADUAL = {"schedule": "gradual", "epochs": 3, "lr": 1e-3, "batch_size": 8}  # 24 steps, cuts in the first 16


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_gradual_cuts_follow_the_schedule(family: str, tmp_path: Path) -> None:
    made = loaded(tmp_path / "model", family, heads=4, neurons=48)
    context = by_taylor(made, tmp_path, sparsity=0.5, **GRADUAL)
    tokens = float(context.encoded["train"].lengths.mean())
    layers = encoder_layers(made.model, made.family)
    dense = sum(layer_macs(layer, tokens) for layer in layers)
    prices = costs(layers, tokens)
    applied = contexts.applied(prune, context)
    trace = applied.method.detail["steps"]
    assert [row["step"] for row in trace] == [2, 4, 6, 8, 10, 12, 14, 16]
    head, neuron = prices.heads[0][0], prices.neurons[0][0]
    for number, row in enumerate(trace, 1):
        left = row["heads"] * head + row["neurons"] * neuron
        wanted = dense * (1 - 0.5 * (1 - (1 - number / 8) ** 3))
        assert wanted - head < left <= wanted * (1 + 1e-9)
    assert applied.method.detail["encoder_macs_kept"] <= 0.5
    assert applied.method.detail["recovery"]["epochs"] == 3
    assert applied.method.detail["recovery"]["best_epoch"] == 3  # the last one: earlier ones were larger
    now = encoder_layers(made.model, made.family)
    assert sum(x.heads for x in now) == trace[-1]["heads"]
    again = tiny.reload(made, tmp_path / "out")
    assert torch.equal(logits(again.model, family), logits(made.model, family))


def test_the_cut_at_the_end_is_what_the_masks_hid(tmp_path: Path, monkeypatch) -> None:
    made = loaded(tmp_path / "model")
    masked = []
    apply = gradual.transforms.apply

    def spy(model, cut) -> None:
        if model is made.model:
            masked.append(masked_logits(made, cut))
        apply(model, cut)

    monkeypatch.setattr(gradual.transforms, "apply", spy)
    contexts.applied(prune, by_taylor(made, tmp_path, sparsity=0.6, **GRADUAL))
    assert len(masked) == 1
    assert torch.allclose(logits(made.model, "bert"), masked[0], atol=TOLERANCE)
    hooks = [h for m in made.model.modules() for h in m._forward_pre_hooks.values()]
    assert not [h for h in hooks if "UnitMasks" in h.__qualname__]


def test_zeros_grow_along_the_schedule_and_stay(tmp_path: Path) -> None:
    made = loaded(tmp_path / "model")
    applied = contexts.applied(prune, by_taylor(made, tmp_path, structure="weights", sparsity=0.6, **GRADUAL))
    trace = applied.method.detail["steps"]
    total = sum(w.numel() for w in encoder_weights(made.model))
    for number, row in enumerate(trace, 1):
        # Each matrix or all together: counts are rounded to whole weights.
        assert row["zero_share"] == pytest.approx(0.6 * (1 - (1 - number / 8) ** 3), abs=20 / total)
    zeros = sum(int((w == 0).sum()) for w in encoder_weights(made.model))
    assert zeros / total == pytest.approx(0.6, abs=20 / total)
    assert isinstance(made.log.transforms[0], Zero)
    assert sum(made.log.transforms[0].tensors.values()) == zeros
    dense = checkpoints.load(tmp_path / "model")
    for after, before in zip(encoder_weights(made.model), encoder_weights(dense.model), strict=True):
        assert not torch.equal(after[after != 0], before[after != 0])


class _Stop(Progress):
    """Sends SIGINT to this process at one training step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def task(self, title: str, total: int):
        outer = self

        class Task:
            seen = 0

            def advance(self, steps: int = 1, detail: str = "") -> None:
                Task.seen += steps
                if title == "recovery" and steps and Task.seen == outer.at:
                    os.kill(os.getpid(), signal.SIGINT)

        import contextlib

        return contextlib.nullcontext(Task())


@pytest.mark.parametrize("structure", ["heads+neurons", "weights"])
@pytest.mark.parametrize("at", [5, 17])
def test_an_interrupted_gradual_run_gives_the_same_bytes(structure: str, at: int, tmp_path: Path) -> None:
    options = {"structure": structure, "sparsity": 0.5, **GRADUAL}
    whole = loaded(tmp_path / "model")
    straight = contexts.applied(prune, by_taylor(whole, tmp_path / "a", **options))
    broken = by_taylor(loaded(tmp_path / "model"), tmp_path / "b", **options)
    broken.progress = _Stop(at)
    with pytest.raises(InterruptedRun):
        contexts.applied(prune, broken)
    resumed = by_taylor(loaded(tmp_path / "model"), tmp_path / "b", **options)
    resumed.request = replace(
        resumed.request, common=resumed.request.common.model_copy(update={"resume": True})
    )
    later = contexts.applied(prune, resumed)
    state, other = whole.model.state_dict(), resumed.checkpoint.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert later.method.detail["steps"] == straight.method.detail["steps"]
    assert resumed.checkpoint.log.transforms == whole.log.transforms
    # A training that had ended is not run again, and what was cut is still known.
    third = by_taylor(loaded(tmp_path / "model"), tmp_path / "b", **options)
    third.request = resumed.request
    contexts.applied(prune, third)
    assert third.checkpoint.log.transforms == whole.log.transforms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 1.0}, "above 1"),
        ({"target_speedup": float("nan")}, "above 1"),
        ({"target_speedup": 2.0, "budget": 0.5}, "budget and target_speedup exclude each other"),
        ({"target_speedup": 2.0, "structure": "weights"}, "heads and neurons, not weights"),
        ({"schedule": "gradual"}, "prunes while it trains"),
        ({"schedule": "gradual", "structure": "2:4", "epochs": 1}, "little by little, not 2:4"),
    ],
)
def test_amounts_that_mean_nothing_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prune.prepare(by_taylor(tiny.checkpoint(), tmp_path, **options))
