"""The shortened last layer answers as the whole one, and gives the same gradients."""

from __future__ import annotations

import pytest
import torch

from kdcli.training.first_token import first_token_only
from kdcli.training.terms import Needs
from tests import tiny


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_logits_and_gradients_are_those_of_the_whole_model(family: str) -> None:
    made = tiny.checkpoint(family)
    batch = tiny.batch(family, rows=6)
    assert (batch["attention_mask"] == 0).any()  # padding takes part

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = made.model(**batch).logits
        parameters = list(made.model.parameters())
        grads = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        return logits.detach(), [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]

    whole, whole_grads = run()
    with first_token_only(made, Needs(pooled=True)) as shortened:
        assert shortened
        short, short_grads = run()
    # float32 sums in another order.
    assert torch.allclose(whole, short, atol=1e-5)
    for one, two in zip(whole_grads, short_grads, strict=True):
        assert torch.allclose(one, two, atol=1e-4 * max(1.0, float(one.abs().max())))
    again, _ = run()
    assert torch.equal(again, whole)  # nothing is left behind


@pytest.mark.parametrize(
    "needs", [Needs(hidden=frozenset({2})), Needs(attention=frozenset({2})), Needs(hidden=frozenset({0, 2}))]
)
def test_it_stays_whole_where_its_tokens_are_read(needs: Needs) -> None:
    with first_token_only(tiny.checkpoint(), needs) as shortened:
        assert not shortened


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_families_that_it_does_not_know_stay_whole(family: str) -> None:
    with first_token_only(tiny.checkpoint(family), Needs()) as shortened:
        assert not shortened


def test_lower_layers_may_be_read() -> None:
    with first_token_only(
        tiny.checkpoint(), Needs(hidden=frozenset({0, 1}), attention=frozenset({1}))
    ) as shortened:
        assert shortened
