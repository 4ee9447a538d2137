"""The prune stage on tiny models: what it removes, what it reports, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.context import Context
from kdcli.errors import InputError, UsageError
from kdcli.families.modules import projections
from kdcli.families.stack import encoder_layers
from kdcli.models import checkpoint as checkpoints
from kdcli.models import transforms
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from tests import tiny
from tests.stages import contexts

# float32 sums in another order; logits are of order 1.
TOLERANCE = 1e-5


def context_of(
    made, work: Path, *, settings=None, labelled: bool = True, seed: int = 0, **options
) -> Context:
    splits = {"train": contexts.rows(64, 1), "validation": contexts.rows(24, 2)}
    context = contexts.of(PruneOptions(**options), made, work, splits=splits, settings=settings, seed=seed)
    if not labelled:
        train = replace(context.encoded["train"], labels=None)
        context.encoded = {**context.encoded, "train": train}
    return context


def logits(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.batch(family)).logits


def masked_logits(made, cut) -> torch.Tensor:
    """Logits of the uncut model with everything that ``cut`` does not keep multiplied by zero."""
    hooks = []
    for layer in encoder_layers(made.model, made.family):
        i = layer.index
        for module, count, width, kept in (
            (layer.attention_output, layer.heads, layer.head_size, cut.heads.get(i)),
            (layer.ffn_out, layer.neurons, 1, cut.neurons.get(i)),
        ):
            if kept is not None:
                mask = torch.zeros(count)
                mask[kept] = 1
                mask = mask.repeat_interleave(width)
                hooks.append(module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    found = logits(made.model, made.model_type)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("sparsity", [0.4, 0.9])
def test_cut_model_answers_like_the_masked_one_and_reloads(
    family: str, sparsity: float, tmp_path: Path
) -> None:
    made, untouched = tiny.checkpoint(family), tiny.checkpoint(family)
    applied = contexts.applied(
        prune, context_of(made, tmp_path, method="taylor", sparsity=sparsity, settings={"steps": "3"})
    )
    (cut,) = made.log.transforms
    got = logits(made.model, family)
    assert torch.allclose(got, masked_logits(untouched, cut), atol=TOLERANCE)
    assert not torch.allclose(got, logits(untouched.model, family), atol=1e-3)
    assert torch.equal(logits(tiny.reload(made, tmp_path / "out").model, family), got)
    detail = applied.method.detail
    # One head of this small model is 8 % of it: the budget is met to less than that.
    assert 1 - sparsity - 0.08 < detail["encoder_macs_kept"] <= 1 - sparsity + 1e-9
    assert detail["encoder_macs_after"] == pytest.approx(
        sum(r["macs_after"] for r in applied.method.layers), abs=2
    )
    assert applied.warnings == []
    for row, layer in zip(applied.method.layers, encoder_layers(made.model, made.family), strict=True):
        assert (row["heads_before"], row["neurons_before"]) == (4, 48)
        assert (row["heads_after"], row["neurons_after"]) == (layer.heads, layer.neurons)


@pytest.mark.parametrize("structure", ["weights", "heads", "neurons", "heads+neurons"])
def test_sparsity_zero_changes_nothing(structure: str, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    before = logits(made.model, "bert")
    applied = contexts.applied(prune, context_of(made, tmp_path, structure=structure, sparsity=0.0))
    assert torch.equal(logits(made.model, "bert"), before)
    assert not [t for t in made.log.transforms if isinstance(t, transforms.Cut)]
    assert applied.method.params["sparsity"] == 0.0


def test_each_structure_takes_its_own_kind_only(tmp_path: Path) -> None:
    for structure, other in (("heads", "neurons"), ("neurons", "heads")):
        made = tiny.checkpoint()
        method = contexts.applied(prune, context_of(made, tmp_path, structure=structure, sparsity=0.5)).method
        assert (
            sum(r[f"{structure}_after"] for r in method.layers)
            == sum(r[f"{structure}_before"] for r in method.layers) / 2
        )
        assert all(r[f"{other}_after"] == r[f"{other}_before"] for r in method.layers)
        assert method.params["sparsity_of"] == f"multiply-accumulates of the {structure}"


def test_defaults_are_written_down(tmp_path: Path) -> None:
    method = contexts.applied(prune, context_of(tiny.checkpoint(), tmp_path)).method
    assert method.name == "sensitivity"
    expected = {"structure": "heads+neurons", "sparsity": 0.3, "samples": 2048, "refit_head": True}
    assert expected.items() <= method.params.items()
    assert len(method.detail["sensitivity"]) == 2 * (4 + 5)  # layers; levels of 4 heads and of 48 neurons
    assert method.detail["rows"] == 64


def test_budget_is_the_share_of_the_whole_encoder(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    method = contexts.applied(
        prune,
        context_of(made, tmp_path, structure="neurons", method="taylor", budget=0.8, schedule="one-shot"),
    ).method
    assert method.detail["encoder_macs_kept"] == pytest.approx(0.8, abs=0.01)
    assert len(method.detail["steps"]) == 1
    with pytest.raises(UsageError, match="cannot be met by removing neurons"):
        contexts.applied(prune, context_of(tiny.checkpoint(), tmp_path, structure="neurons", budget=0.05))


def test_a_head_and_a_neuron_survive_any_sparsity(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    applied = contexts.applied(prune, context_of(made, tmp_path, sparsity=0.9999))
    layers = encoder_layers(made.model, made.family)
    assert (sum(x.heads for x in layers), sum(x.neurons for x in layers)) == (1, 1)
    assert [w.code for w in applied.warnings] == ["budget-missed"]
    assert torch.isfinite(logits(made.model, "bert")).all()


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_pruned_model_can_be_pruned_again(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    first = contexts.applied(prune, context_of(made, tmp_path, sparsity=0.4)).method
    second = contexts.applied(prune, context_of(made, tmp_path, sparsity=0.4)).method
    assert len(made.log.transforms) == 2
    for a, b in zip(first.layers, second.layers, strict=True):
        assert (a["heads_after"], a["neurons_after"]) == (b["heads_before"], b["neurons_before"])
    assert second.detail["encoder_macs_before"] == first.detail["encoder_macs_after"]
    again = tiny.reload(made, tmp_path / "out")
    assert torch.equal(logits(again.model, family), logits(made.model, family))


def test_same_seed_same_model_other_seed_other_sample(tmp_path: Path) -> None:
    cuts = []
    for seed in (0, 0, 1):
        made = tiny.checkpoint()
        contexts.applied(
            prune, context_of(made, tmp_path, settings={"samples": "6"}, sparsity=0.5, seed=seed)
        )
        cuts.append(made.log.transforms[0])
    assert cuts[0] == cuts[1]
    assert cuts[0] != cuts[2]


def test_without_labels_the_models_own_answers_count(tmp_path: Path) -> None:
    cuts = []
    for labelled in (True, False):
        made = tiny.checkpoint(seed=1)
        context = context_of(made, tmp_path, labelled=labelled, sparsity=0.5)
        if labelled:  # exactly the labels that the model would give itself
            train = context.encoded["train"]
            own = []
            with torch.no_grad():
                for i in range(len(train)):
                    ids = torch.from_numpy(train.take([i]).ids.astype(np.int64))[None]
                    own.append(int(made.model(input_ids=ids).logits.argmax()))
            context.encoded = {**context.encoded, "train": replace(train, labels=np.array(own))}
            assert len(set(own)) == 2
        contexts.applied(prune, context)
        cuts.append(made.log.transforms[0])
    assert cuts[0] == cuts[1]


def encoder_weights(model) -> list[torch.Tensor]:
    return [m.weight for name, m in projections(model).items() if "encoder.layer" in name]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_become_zero_and_the_report_says_that_nothing_shrinks(scope: str, tmp_path: Path) -> None:
    made, dense = tiny.checkpoint(), tiny.checkpoint()
    options = {"structure": "weights", "method": "magnitude", "sparsity": 0.6, "settings": {"scope": scope}}
    applied = contexts.applied(prune, context_of(made, tmp_path, **options))
    shares = [float((w == 0).float().mean()) for w in encoder_weights(made.model)]
    total = sum(w.numel() for w in encoder_weights(made.model))
    assert sum(int((w == 0).sum()) for w in encoder_weights(made.model)) == pytest.approx(0.6 * total, abs=6)
    assert (max(shares) - min(shares) < 0.002) == (scope == "layer")
    for after, before in zip(encoder_weights(made.model), encoder_weights(dense.model), strict=True):
        assert torch.equal(after[after != 0], before[after != 0])
    outside = "classifier.weight"
    assert torch.equal(made.model.get_parameter(outside), dense.model.get_parameter(outside))
    (zero,) = made.log.transforms
    assert (
        sum(zero.tensors.values())
        == applied.method.detail["zeros"]
        == sum(r["zeros"] for r in applied.method.layers)
    )
    assert [w.code for w in applied.warnings] == ["zeros-not-smaller"]
    assert "nothing smaller or faster" in applied.warnings[0].message
    assert applied.method.detail["note"] == applied.warnings[0].message
    again = tiny.reload(made, tmp_path / "out")
    assert torch.equal(logits(again.model, "bert"), logits(made.model, "bert"))


@pytest.mark.parametrize("structure", ["weights", "heads+neurons"])
def test_recovery_trains_what_is_left_and_keeps_the_zeros(
    structure: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    made = checkpoints.load(tiny.saved(tmp_path / "model"))
    options = {"structure": structure, "sparsity": 0.5, "epochs": 1, "lr": 1e-3, "batch_size": 16}
    applied = contexts.applied(prune, context_of(made, tmp_path, **options))
    untrained = checkpoints.load(tmp_path / "model")
    contexts.applied(prune, context_of(untrained, tmp_path, structure=structure, sparsity=0.5))
    assert applied.method.detail["recovery"]["epochs"] == 1
    assert made.log.transforms[0] == untrained.log.transforms[0]
    for after, before in zip(encoder_weights(made.model), encoder_weights(untrained.model), strict=True):
        assert not torch.equal(after, before)
        assert torch.equal(after == 0, before == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "head"}, "did you mean 'heads'"),
        ({"schedule": "oneshot"}, "did you mean 'one-shot'"),
        ({"schedule": "one-shot"}, "sensitivity judges it once"),
        ({"structure": "weights", "schedule": "iterative"}, "sparsegpt judges it once"),
        ({"method": "tailor"}, "did you mean 'taylor'"),
        ({"method": "wanda"}, "does not prune heads\\+neurons"),
        ({"structure": "weights", "method": "taylor"}, "use magnitude"),
        ({"sparsity": 0.3, "budget": 0.7}, "give one of them"),
        ({"sparsity": 1.0}, "must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "must be at least 0 and below 1"),
        ({"sparsity": float("nan")}, "must be at least 0 and below 1"),
        ({"budget": 0.0}, "must be above 0 and at most 1"),
        ({"budget": 1.01}, "must be above 0 and at most 1"),
        ({"structure": "weights", "budget": 0.5}, "removes none"),
        ({"epochs": -1}, "must be at least 0"),
        ({"method": "taylor", "settings": {"step": "3"}}, "did you mean 'steps'"),
        ({"method": "taylor", "settings": {"steps": "0"}}, "steps=0"),
        ({"structure": "weights", "settings": {"steps": "3"}}, "unknown setting 'steps'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        prune.prepare(context_of(tiny.checkpoint(), tmp_path, **options))


def test_other_architectures_and_empty_encoders_are_input_errors(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    for layer in encoder_layers(made.model, made.family):
        layer.keep_heads([])
    with pytest.raises(InputError, match="no heads left"):
        contexts.applied(prune, context_of(made, tmp_path, structure="heads"))
    made.model.config.model_type = "xlnet"
    with pytest.raises(InputError, match="type 'xlnet'"):
        prune.prepare(context_of(made, tmp_path))
