"""Counted multiply-accumulates against the formula of an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdcli.measure import compute
from tests import tiny


def formula(tokens: int, *, layers: int = 2, hidden: int = 32, neurons: int = 48, classes: int = 2) -> int:
    """MACs of an encoder whose classifier is one hidden layer and one output layer on the first token."""
    projections = tokens * (4 * hidden * hidden + 2 * hidden * neurons)
    attention = 2 * tokens * tokens * hidden  # scores and mixing; the heads' number cancels
    return layers * (projections + attention) + hidden * hidden + hidden * classes


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tokens", [2, 9])
def test_every_family_counts_as_the_formula_says(family: str, tokens: int) -> None:
    assert compute.macs(tiny.checkpoint(family).model, tokens) == formula(tokens)


def test_removed_neurons_are_not_counted() -> None:
    model = tiny.checkpoint("bert", neurons=20).model
    assert compute.macs(model, 8) == formula(8, neurons=20)


def test_an_attention_that_the_counter_does_not_see_is_refused() -> None:
    model: Any = tiny.checkpoint("bert").model
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"'sdpa'.*load the model as 'eager'"):
        compute.macs(model, 8)


def test_counting_leaves_no_gradients_and_works_in_inference_mode() -> None:
    model = tiny.checkpoint("bert").model
    with torch.inference_mode():
        inside = compute.macs(model, 8)
    assert inside == compute.macs(model, 8)
    assert all(p.grad is None for p in model.parameters())
