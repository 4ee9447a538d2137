"""What layers see: against a forward pass that is looked at from outside, and without padding."""

from __future__ import annotations

import pytest
import torch

from kdcli.models import transforms
from kdcli.stages.prune.criterion import Pattern
from kdcli.stages.prune.statistics import sequentially
from tests import tiny
from tests.stages.prune.criteria.jobs import padded, singly, weight_job


def gathered(made, batches=None, statistic="moment", change=None) -> dict[str, torch.Tensor]:
    found = {}

    def decide(name, layer, moment):
        found[name] = moment.clone()
        if change is not None:
            change(name, layer)

    sequentially(weight_job(made, Pattern(0.5), batches), statistic, decide)
    return found


@torch.no_grad()
def seen_by(made, batch) -> dict[str, torch.Tensor]:
    """Mean of x x^T over the real tokens that every matrix is given in one pass of the model, in float64."""
    real, found, hooks = batch["attention_mask"].bool(), {}, []
    for name, layer in weight_job(made, Pattern()).matrices.items():

        def see(_, args, name=name):
            x = args[0][real].double()
            found[name] = x.T @ x / len(x)

        hooks.append(layer.register_forward_pre_hook(see))
    made.model(**batch)
    for hook in hooks:
        hook.remove()
    return found


# Sums in float32 of a few dozen products of order one.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_moments_are_those_of_the_models_own_pass(family: str) -> None:
    made = tiny.checkpoint(family)
    expected, found = seen_by(made, tiny.batch(family)), gathered(made)
    assert list(found) == list(expected)  # the order in which they run
    assert len(found) == 12
    squares = gathered(made, statistic="squares")
    for name, moment in found.items():
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, expected[name], **TOLERANCE)
        torch.testing.assert_close(squares[name], expected[name].diagonal(), **TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_padding_and_batches_do_not_count(family: str) -> None:
    made, batch = tiny.checkpoint(family), tiny.batch(family)
    assert not batch["attention_mask"].all()
    plain = gathered(made)
    for batches in (singly(batch), padded(batch, 7, made.pad_id)):
        for name, moment in gathered(made, batches).items():
            torch.testing.assert_close(moment, plain[name], **TOLERANCE)


def test_later_matrices_see_the_earlier_ones_as_they_became() -> None:
    made = tiny.checkpoint()

    def thin(name, layer):
        layer.weight.mul_((torch.arange(layer.weight.numel()) % 3 > 0).view_as(layer.weight))

    dense, found = seen_by(made, tiny.batch()), gathered(made, change=thin)
    after = seen_by(made, tiny.batch())
    for number, (name, moment) in enumerate(found.items()):
        torch.testing.assert_close(moment, after[name], **TOLERANCE)
        assert torch.allclose(moment, dense[name], rtol=1e-2) == (number < 3)  # query, key and value


def test_factors_and_emptied_layers_are_passed_through() -> None:
    made = tiny.checkpoint()
    job = weight_job(made, Pattern())
    transforms.factorise(made.model, next(iter(job.matrices)), 5)
    job.layers[0].keep_neurons([])
    job.layers[1].keep_heads([])
    found, expected = gathered(made), seen_by(made, tiny.batch())
    assert set(found) == set(weight_job(made, Pattern()).matrices)
    for name, moment in found.items():
        torch.testing.assert_close(moment, expected[name], **TOLERANCE)
