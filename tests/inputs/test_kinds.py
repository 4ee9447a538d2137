"""What a batch is asked, for the one kind that there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.data.readers import Rows
from kdcli.errors import InputError
from kdcli.inputs import batching, feeding, kinds, text
from kdcli.inputs.text import TEXT
from tests import tiny


def collated() -> dict[str, np.ndarray]:
    made = tiny.checkpoint()
    rows = Rows(["a film", "the plot was good and it was quite funny"], None, None)
    return batching.collate(text.encode(rows, made.tokenizer, 20, None), [0, 1], made.pad_id)


def test_a_batch_tells_its_rows_its_shape_and_its_real_tokens() -> None:
    batch = collated()
    real = [2 + 2, 9 + 2]  # words, and the special tokens around them
    assert kinds.of(batch) is TEXT
    assert (kinds.size(batch), kinds.shape(batch), kinds.tokens(batch)) == (2, (2, max(real)), sum(real))
    assert kinds.mask(batch).sum(1).tolist() == real
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    assert kinds.shape(tensors) == (2, 11)
    assert kinds.tokens(tensors) == 15.0
    assert torch.equal(feeding.real(batch, "cpu"), kinds.mask(tensors).bool())


def test_what_is_of_no_kind_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"pixels are of no kind.*'input_ids' \(text\)"):
        kinds.of(["pixels"])


def test_segments_that_are_asked_for_and_not_given_are_zeros() -> None:
    batch = collated()
    without = {name: values for name, values in batch.items() if name not in TEXT.optional}
    filled = TEXT.filled(without, TEXT.names)
    assert list(filled) == list(TEXT.names)
    assert not filled["token_type_ids"].any()
    assert filled["token_type_ids"].shape == (2, 11)
    assert list(TEXT.filled(batch, ["input_ids"])) == ["input_ids"]
    given = {**batch, "token_type_ids": np.ones_like(batch["input_ids"])}
    assert TEXT.filled(given, TEXT.names)["token_type_ids"].all()


@pytest.mark.parametrize("tokens", [2, 3, 7, 512])
def test_an_example_has_no_dimension_that_could_be_taken_for_a_constant(tokens: int) -> None:
    made = TEXT.example(5, TEXT.names, "cpu", tokens=tokens)
    assert {tuple(tensor.shape) for tensor in made.values()} == {(2, min(tokens, 7))}
    assert int(made["input_ids"].max()) < 5
    assert bool(made["attention_mask"].all()) == (tokens == 2)  # a row needs one real token
    assert list(TEXT.example(5, ["attention_mask"], "cpu")) == ["attention_mask"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_is_one_that_the_model_answers(family: str) -> None:
    made = tiny.checkpoint(family)
    with torch.no_grad():
        logits = made.model(**TEXT.row(made.config, 6, "cpu")).logits
    assert logits.shape == (1, 2)
    assert bool(logits.isfinite().all())


def test_a_module_that_hands_on_takes_everything_and_each_receiver_its_part() -> None:
    bert, distilbert = tiny.checkpoint("bert").model, tiny.checkpoint("distilbert").model

    class Both(feeding.HandsOn):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.config = nn.ModuleList([bert, distilbert]), bert.config

    assert feeding.accepted(Both()) == set(TEXT.names)
    batch = {name: torch.from_numpy(values) for name, values in TEXT.filled(collated(), TEXT.names).items()}
    assert set(feeding.taken(bert, batch)) == set(TEXT.names)
    assert set(feeding.taken(distilbert, batch)) == set(TEXT.names) - {"token_type_ids"}
