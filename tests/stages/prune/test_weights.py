"""Structures that only make zeros, through the stage: exact patterns, repetition, reload, and recovery that holds."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcli.errors import InterruptedRun, UsageError
from kdcli.families.modules import projections
from kdcli.families.stack import encoder_layers
from kdcli.models import checkpoint as checkpoints
from kdcli.models.transforms import Zero
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune import learned_masks
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.criteria import magnitude
from kdcli.training.recovery import zeros_of
from tests import tiny
from tests.stages import contexts
from tests.stages.prune.test_stage import context_of, logits

ONE_SHOT = ("magnitude", "wanda", "sparsegpt")


def matrices(made) -> dict[str, torch.Tensor]:
    prefix = made.family.layers + "."
    found = projections(made.model)
    return {name: m.weight.detach() for name, m in found.items() if name.startswith(prefix)}


def share(made) -> float:
    weights = matrices(made).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def at_most(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Whether every whole block of M neighbours along the input has at most N weights that are not zero."""
    whole = weight.shape[1] // m * m
    return (weight[:, :whole].unflatten(1, (-1, m)) != 0).sum(-1) <= n


@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:8"])
def test_n_of_m_is_exact_in_every_block_and_reloads(method: str, structure: str, tmp_path: Path) -> None:
    made = tiny.checkpoint("mpnet")
    n, m = (int(x) for x in structure.split(":"))
    applied = contexts.applied(prune, context_of(made, tmp_path, structure=structure, method=method))
    for weight in matrices(made).values():
        assert at_most(weight, n, m).all()
        assert int((weight == 0).sum()) == (1 - n / m) * weight.numel()
    assert applied.method.params["structure"] == structure
    assert "sparsity" not in applied.method.params
    assert applied.method.detail["zero_share"] == 1 - n / m
    (zero,) = made.log.transforms
    assert (zero.sparsity, sum(zero.tensors.values())) == (1 - n / m, applied.method.detail["zeros"])
    assert [w.code for w in applied.warnings] == ["zeros-not-smaller"]
    assert torch.equal(
        logits(tiny.reload(made, tmp_path / "out").model, "mpnet"), logits(made.model, "mpnet")
    )


def test_a_rest_of_fewer_than_m_stays_and_is_named(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    encoder_layers(made.model, made.family)[0].keep_neurons(list(range(45)))
    applied = contexts.applied(prune, context_of(made, tmp_path, structure="2:4", method="sparsegpt"))
    name = "bert.encoder.layer.0.output.dense"
    weight = matrices(made)[name]
    assert weight.shape[1] == 45
    assert (weight[:, 44] != 0).all()
    assert (weight[:, :44].unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert applied.method.detail["not_whole"] == [name]
    assert [w.code for w in applied.warnings] == ["zeros-not-smaller", "rest-dense"]
    assert applied.warnings[1].message.startswith("in 1 of 12 matrices")


@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize(
    ("first", "second"), [("weights", "weights"), ("weights", "2:4"), ("2:4", "weights")]
)
def test_pruning_again_goes_on_from_where_it_was(
    method: str, first: str, second: str, tmp_path: Path
) -> None:
    made = tiny.checkpoint()
    shares = {"2:4": [None, None], "weights": [0.3, 0.7]}
    before: dict[str, torch.Tensor] = {}
    for number, structure in enumerate((first, second)):
        options = {"structure": structure, "method": method, "sparsity": shares[structure][number]}
        contexts.applied(prune, context_of(made, tmp_path, **options))
        now = {name: weight == 0 for name, weight in matrices(made).items()}
        assert all(bool(now[name][zero].all()) for name, zero in before.items())
        before = {name: zero.clone() for name, zero in now.items()}
        made = tiny.reload(made, tmp_path / f"out{number}")
    if second == "2:4":
        assert all(at_most(weight, 2, 4).all() for weight in matrices(made).values())
    else:
        # Wanda rounds for every row of 32 or 48 by itself.
        assert share(made) == pytest.approx(0.7, abs=0.01 if method == "wanda" else 1e-4)
    assert [type(t) for t in made.log.transforms] == [Zero, Zero]


def saved(tmp_path: Path, **options):
    """A model on disk that was pruned before."""
    made = checkpoints.load(tiny.saved(tmp_path / "dense"))
    if options:
        contexts.applied(prune, context_of(made, tmp_path, **options))
    return tiny.reload(made, tmp_path / "pruned")


TRAIN = {"epochs": 1, "lr": 1e-3, "batch_size": 16}


@pytest.mark.parametrize("structure", ["weights", "2:4", "heads", "neurons"])
def test_recovery_holds_the_zeros_of_earlier_runs(structure: str, tmp_path: Path) -> None:
    """Also where the later stage cuts units out, so that the zeros are elsewhere than they were."""
    made = saved(tmp_path, structure="weights", sparsity=0.6)
    untrained = checkpoints.load(tmp_path / "pruned")
    options = {"structure": structure, "sparsity": None if structure == "2:4" else 0.5, "method": "magnitude"}
    contexts.applied(prune, context_of(made, tmp_path, **options, **TRAIN))
    contexts.applied(prune, context_of(untrained, tmp_path, **options))
    assert share(untrained) > 0.5
    for name, weight in matrices(made).items():
        before = matrices(untrained)[name]
        assert torch.equal(weight == 0, before == 0), name
        assert not torch.equal(weight, before)


def test_recovery_of_another_stage_holds_them_too(tmp_path: Path) -> None:
    made = saved(tmp_path, structure="weights", sparsity=0.6)
    before = {name: weight == 0 for name, weight in matrices(made).items()}
    context = context_of(made, tmp_path)
    options = LowRankOptions(budget=0.6, include=("*.layer.0.*query", "*.layer.0.*intermediate*"), **TRAIN)
    context.request = dataclasses.replace(context.request, stage="lowrank", options=options)
    lowrank.prepare(context)
    contexts.applied(lowrank, context)
    left = matrices(made)
    same = [name for name in before if name in left and left[name].shape == before[name].shape]
    assert 6 <= len(same) < 12
    assert all(torch.equal(left[name] == 0, before[name]) for name in same)


def test_only_weights_that_the_log_names_are_held() -> None:
    made = tiny.checkpoint()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():
        made.model.get_parameter(name)[0] = 0.0
    assert zeros_of(made) == {}
    made.log.transforms.append(Zero(sparsity=0.1, tensors={name: 32, "was.factorised.weight": 3}))
    ((found, (weight, zero)),) = zeros_of(made).items()
    assert found == name
    assert weight is made.model.get_parameter(name)
    assert int(zero.sum()) == 32


def test_a_method_that_fits_matrices_again_is_said_to_fill_zeros(tmp_path: Path, monkeypatch) -> None:
    made = saved(tmp_path, structure="weights", sparsity=0.6)
    prune_ = magnitude.prune

    def refit(job, config):
        found = prune_(job, config)
        with torch.no_grad():
            job.layers[0].ffn_out.weight.add_(0.01)
        return found

    monkeypatch.setattr(magnitude, "METHOD", replace(magnitude.METHOD, prune=refit))
    applied = contexts.applied(prune, context_of(made, tmp_path, method="magnitude", sparsity=0.5))
    (warning,) = applied.warnings
    assert warning.code == "zeros-refilled"
    assert warning.message.startswith("1 of the matrices that an earlier stage")


@pytest.mark.parametrize("structure", ["weights", "1:4"])
def test_movement_trains_masks_of_the_exact_size(structure: str, tmp_path: Path) -> None:
    made = checkpoints.load(tiny.saved(tmp_path / "dense"))
    dense = checkpoints.load(tmp_path / "dense")
    options = {"structure": structure, "method": "movement", "settings": {"every": "3"}}
    options |= {"sparsity": None} if structure == "1:4" else {"sparsity": 0.75}
    applied = contexts.applied(prune, context_of(made, tmp_path, **options, **(TRAIN | {"epochs": 3})))
    assert share(made) == 0.75
    for name, weight in matrices(made).items():
        assert (structure != "1:4") or at_most(weight, 1, 4).all()
        assert not torch.equal(weight[weight != 0], matrices(dense)[name][weight != 0])
    assert applied.method.detail["recovery"]["best_epoch"] == 3
    # What stays is not what is largest: the scores have decided.
    large = matrices(dense)["bert.encoder.layer.0.intermediate.dense"].abs()
    stays = matrices(made)["bert.encoder.layer.0.intermediate.dense"] != 0
    top = large.flatten().topk(int(stays.sum())).indices
    assert not stays.flatten()[top].all()
    assert set(made.model.state_dict()) == set(dense.model.state_dict())
    assert torch.equal(logits(tiny.reload(made, tmp_path / "out").model, "bert"), logits(made.model, "bert"))


def test_movement_holds_earlier_zeros(tmp_path: Path) -> None:
    made = saved(tmp_path, structure="weights", sparsity=0.5, method="wanda")
    before = {name: weight == 0 for name, weight in matrices(made).items()}
    contexts.applied(
        prune, context_of(made, tmp_path, structure="weights", method="movement", sparsity=0.8, **TRAIN)
    )
    assert all(bool((weight == 0)[before[name]].all()) for name, weight in matrices(made).items())
    assert share(made) == pytest.approx(0.8, abs=1e-4)


def test_movement_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path, monkeypatch) -> None:
    options = {"structure": "weights", "method": "movement", "sparsity": 0.7, "settings": {"every": "3"}}
    found = []
    for stop in (None, 5):
        made = checkpoints.load(tiny.saved(tmp_path / "dense"))
        context = context_of(made, tmp_path / str(stop), **options, **(TRAIN | {"epochs": 2}))
        if stop is not None:
            step = learned_masks._Scores.after_step

            def interrupted(self, step=step, stop=stop):
                step(self)
                if int(self.step) == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            with monkeypatch.context() as patch:
                patch.setattr(learned_masks._Scores, "after_step", interrupted)
                with pytest.raises(InterruptedRun):
                    contexts.applied(prune, context)
            made = checkpoints.load(tmp_path / "dense")
            context.checkpoint = made
            common = context.request.common.model_copy(update={"resume": True})
            context.request = dataclasses.replace(context.request, common=common)
            contexts.applied(prune, context)
        else:
            contexts.applied(prune, context)
        found.append(matrices(made))
    for name, weight in found[0].items():
        assert torch.equal(found[1][name], weight), name


def test_a_movement_training_that_had_ended_is_not_run_again(tmp_path: Path, monkeypatch) -> None:
    """Its resume point holds the result alone: the masks have to be in it."""
    options = {"structure": "weights", "method": "movement", "sparsity": 0.7}
    made = checkpoints.load(tiny.saved(tmp_path / "dense"))
    context = context_of(made, tmp_path, **options, **TRAIN)
    contexts.applied(prune, context)
    context.checkpoint = checkpoints.load(tmp_path / "dense")
    common = context.request.common.model_copy(update={"resume": True})
    context.request = dataclasses.replace(context.request, common=common)
    monkeypatch.setattr(learned_masks._Scores, "after_step", None)
    contexts.applied(prune, context)
    for name, weight in matrices(made).items():
        assert torch.equal(matrices(context.checkpoint)[name], weight), name


def test_padding_of_the_sample_does_not_matter(tmp_path: Path) -> None:
    """Batches of one row have no padding, one batch of all rows has much."""
    found = []
    for size in ("1", "64"):
        made = tiny.checkpoint()
        options = {
            "structure": "weights",
            "method": "wanda",
            "sparsity": 0.5,
            "settings": {"batch_size": size},
        }
        contexts.applied(prune, context_of(made, tmp_path, **options))
        found.append(matrices(made))
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "n:m"}, "unknown structure 'n:m'.*2:4"),
        ({"structure": "4:2"}, "N at least 1 and less than M"),
        ({"structure": "0:4"}, "N at least 1 and less than M"),
        ({"structure": "2:4", "sparsity": 0.5}, "says by itself how much becomes zero, 2 of 4"),
        ({"structure": "2:4", "budget": 0.5}, "removes none"),
        ({"structure": "2:4", "method": "taylor"}, "does not prune 2:4; use magnitude"),
        ({"structure": "weights", "method": "movement", "sparsity": 0.5}, "learns in training"),
        ({"method": "wanda"}, "does not prune heads\\+neurons"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prune.prepare(context_of(tiny.checkpoint(), tmp_path, **options))
