"""How long a text may be and how it is padded, against what the models of transformers do with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kdcli.errors import InputError
from kdcli.models import inputs
from kdcli.models.checkpoint import fresh
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 2,
}


class Words:
    """What is read of a tokenizer."""

    def __init__(self, side: str = "right", pad: int | None = 1, limit: float | None = 1e30) -> None:
        self.padding_side, self.pad_token_id, self.model_max_length = side, pad, limit

    def __call__(self, _: str) -> dict[str, list[int]]:
        return {"input_ids": [2, 5, 6, 7, 3]}


def model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    made = fresh(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("bert", {}, 20),
        ("roberta", {"pad_token_id": 1}, 18),
        ("roberta", {"pad_token_id": 3}, 16),
        ("xlm-roberta", {"pad_token_id": 1}, 18),
        ("camembert", {"pad_token_id": 1}, 18),
        ("xlm-roberta-xl", {"pad_token_id": 1}, 18),
        ("mpnet", {}, 18),
        ("longformer", {"pad_token_id": 1, "attention_window": 4}, 18),
        ("roberta-prelayernorm", {"pad_token_id": 1}, 18),
        ("electra", {"embedding_size": 16}, 20),
        ("albert", {"embedding_size": 16}, 20),
        ("roformer", {}, 20),
    ],
)
def test_every_position_that_is_promised_is_there_and_no_further_one(
    kind: str, more: dict[str, Any], expected: int
) -> None:
    made = model(kind, max_position_embeddings=20, **more)
    tokenizer = Words(limit=1e30)
    assert inputs.longest(made, tokenizer) == expected
    row = torch.full((1, expected), 6)
    made(input_ids=row, attention_mask=torch.ones_like(row))
    if kind not in ("longformer", "roformer"):  # which pad to their window, or compute positions
        with pytest.raises((IndexError, RuntimeError)):
            made(input_ids=torch.full((1, expected + 1), 6))
    assert inputs.longest(made, Words(limit=9)) == 9


@pytest.mark.parametrize("limit", [1e30, None, 0, -1])
def test_a_model_without_a_limit_takes_long_texts(limit: float | None) -> None:
    made = model("xlnet", d_model=16, n_layer=1, n_head=2, d_inner=16)
    assert made.config.max_position_embeddings == -1
    assert inputs.longest(made, Words(limit=limit)) == 8192
    assert inputs.longest(made, Words(limit=50)) == 50


def test_the_models_own_padding_comes_first() -> None:
    assert inputs.padding(model("roberta", pad_token_id=3), Words(pad=1), left=False) == 3
    assert inputs.padding(model("mpnet", pad_token_id=None), Words(pad=5), left=False) == 1  # built into it
    assert inputs.padding(model("bert", pad_token_id=None), Words(pad=5), left=False) == 5
    assert inputs.padding(model("bert", pad_token_id=None), Words(pad=None), left=False) == 0


def test_positions_that_are_counted_from_no_padding_are_refused(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"pad_token_id in .* is null, but a model of type 'roberta' counts"):
        inputs.check_padding(model("roberta", pad_token_id=None), tmp_path)
    inputs.check_padding(model("bert", pad_token_id=None), tmp_path)
    inputs.check_padding(tiny.checkpoint("mpnet").model, tmp_path)


def test_only_a_model_that_reads_the_last_token_is_padded_on_the_left() -> None:
    last = model("xlnet", d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0)
    assert inputs.must_pad_left(last, Words("left"))
    assert not inputs.must_pad_left(last, Words("right"))
    assert not inputs.must_pad_left(model("bert"), Words("left"))
    assert inputs.padding_difference(model("bert"), Words("left"), left=False) < inputs.NOISE
    assert inputs.padding_difference(model("bert"), Words("left"), left=True) > inputs.NOISE
