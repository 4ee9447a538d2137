"""Training the rows of the token table that occur is training the table, and leaves the others alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.inputs import batching
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import Encoded
from kdcli.models import transforms
from kdcli.models.tokens import token_tables
from kdcli.progress import Progress
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.training import loop
from kdcli.training.compact import compacted
from kdcli.training.label_loss import label_loss
from kdcli.training.loop import FitOptions, fit
from kdcli.training.side_by_side import Together
from tests import tiny

CPU = torch.device("cpu")
SIZE = len(tiny.tokenizer())
USED = np.array([8, 13, 14, 20, 21, 33, 40])  # of the vocabulary
ALSO = np.array([25])  # in the validation rows only


def texts(rows: int, words: np.ndarray, family: str = "bert", seed: int = 0) -> Encoded:
    """Rows of 3 to 9 of these words between the family's special tokens; a label by the first word."""
    tok, rng = tiny.tokenizer(family), np.random.default_rng(seed)
    made = [rng.choice(words, rng.integers(3, 10)) for _ in range(rows)]
    ids = [np.array([tok.cls_token_id, *row, tok.sep_token_id], dtype=np.int32) for row in made]
    labels = np.array([int(row[0] > 20) for row in made])
    flat = np.concatenate(ids)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Encoded(flat, np.zeros(len(flat), dtype=np.int8), offsets, labels)


def table_of(model: nn.Module) -> torch.Tensor:
    kind: Any = model
    weight: torch.Tensor = kind.get_input_embeddings().weight.detach()
    return weight


@contextlib.contextmanager
def whole_table(model: nn.Module, given: list[Encoded], pad_id: int) -> Iterator[list[Encoded]]:
    """Stands for ``compacted`` and shrinks nothing."""
    yield given


def train(made: Any, weight_decay: float) -> None:
    rows = texts(48, USED)
    assert rows.labels is not None
    fit(
        made.model,
        rows,
        texts(16, np.concatenate([USED, ALSO]), seed=1),
        label_loss(CLASSIFICATION, rows.labels, CPU),
        FitOptions(epochs=3, batch_size=16, lr=5e-3, weight_decay=weight_decay, keep="last"),
        pad_id=made.pad_id,
        device=CPU,
        progress=Progress(),
        title="training",
    )


def occurring() -> torch.Tensor:
    """(V,) bool: the tokens of the training rows."""
    found = torch.zeros(SIZE, dtype=torch.bool)
    found[torch.from_numpy(texts(48, USED).ids).long()] = True
    return found


def test_it_trains_what_the_whole_table_would_train(monkeypatch: pytest.MonkeyPatch) -> None:
    small, whole = tiny.untrained(), tiny.untrained()
    before = table_of(small.model).clone()
    train(small, weight_decay=0.0)
    monkeypatch.setattr(loop, "compacted", whole_table)
    train(whole, weight_decay=0.0)
    one, two = small.model.state_dict(), whole.model.state_dict()
    assert one.keys() == two.keys()
    # The gradients are the same; their norm, by which they are clipped, is summed in another order (1e-7), and
    # 9 steps of at most 5e-3 make no more of it than 1e-5.
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    moved = (table_of(small.model) != before).any(1)
    assert torch.equal(moved, occurring())


def test_rows_that_do_not_occur_stay_as_they_are_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    small, whole = tiny.untrained(), tiny.untrained()
    before = table_of(small.model).clone()
    train(small, weight_decay=0.1)
    after = table_of(small.model)
    absent = ~occurring()
    absent[torch.from_numpy(ALSO)] = False  # seen in validation: in the small table, and decayed there
    absent[small.pad_id] = False
    assert after.shape == before.shape
    assert after[absent].numpy().tobytes() == before[absent].numpy().tobytes()
    monkeypatch.setattr(loop, "compacted", whole_table)
    train(whole, weight_decay=0.1)
    assert (table_of(whole.model)[absent] != before[absent]).any()  # the whole table does decay


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ids_are_mapped_and_nothing_in_the_answers_changes(family: str) -> None:
    made, rows = tiny.checkpoint(family), texts(12, USED, family)
    before = table_of(made.model).clone()

    def logits(encoded: Encoded) -> torch.Tensor:
        batch = batching.collate(encoded, np.arange(len(encoded)), made.pad_id)
        assert (batch["attention_mask"] == 0).any()
        with torch.no_grad():
            found: torch.Tensor = made.model(**model_inputs(made.model, batch, CPU)).logits
        return found

    outside = logits(rows)
    with compacted(made.model, [rows, texts(3, ALSO, family)], made.pad_id) as (mapped, other):
        small = table_of(made.model)
        kept = np.union1d(np.union1d(rows.ids, texts(3, ALSO, family).ids), np.arange(made.pad_id + 1))
        assert torch.equal(small, before[torch.from_numpy(kept)])
        assert made.model.get_input_embeddings().num_embeddings == len(kept) < SIZE  # type: ignore[operator]
        assert torch.equal(
            small[torch.from_numpy(mapped.ids).long()], before[torch.from_numpy(rows.ids).long()]
        )
        assert torch.equal(small[made.pad_id], before[made.pad_id])  # under its own id
        assert not np.isin(mapped.ids, made.pad_id).any()
        assert mapped.ids.dtype == rows.ids.dtype
        assert mapped.labels is rows.labels
        assert len(other) == 3
        assert torch.equal(logits(mapped), outside)  # RoBERTa and MPNet count positions by the padding id
    assert torch.equal(table_of(made.model), before)
    assert torch.equal(logits(rows), outside)


@pytest.mark.parametrize("trained", [True, False])
def test_the_table_comes_back_after_an_exception(trained: bool) -> None:
    made, rows = tiny.checkpoint(), texts(12, USED)
    table: Any = made.model.get_input_embeddings()
    table.weight.requires_grad_(trained)
    before = table_of(made.model).clone()

    def fails() -> None:
        with compacted(made.model, [rows], made.pad_id) as found:
            assert table.weight.requires_grad is trained
            with torch.no_grad():
                table.weight[found[0].ids[1]] += 1
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fails()
    assert table.num_embeddings == SIZE
    assert table.weight.requires_grad is trained
    changed = torch.zeros(SIZE, dtype=torch.bool)
    changed[rows.ids[1]] = True
    assert torch.equal((table_of(made.model) != before).any(1), changed)  # what was trained is not lost
    assert torch.equal(table_of(made.model)[changed], before[changed] + 1)


def test_every_table_of_models_side_by_side_is_shrunk() -> None:
    members = [tiny.checkpoint(seed=n).model for n in range(2)]
    both, rows = Together(members, [0, 1], [1.0, 1.0]), texts(12, USED)
    assert [id(t) for t in both.token_tables()] == [id(m.get_input_embeddings()) for m in members]  # type: ignore[operator]
    assert token_tables(both) == both.token_tables()
    before = [table_of(m).clone() for m in members]

    def answers(encoded: Encoded) -> list[torch.Tensor]:
        batch = batching.collate(encoded, np.arange(len(encoded)), 0)
        with torch.no_grad():
            found: list[torch.Tensor] = both(**model_inputs(both, batch, CPU)).every
        return found

    outside = answers(rows)
    with compacted(both, [rows], 0) as (mapped,):
        assert [len(table_of(m)) for m in members] == [1 + len(np.unique(rows.ids))] * 2
        assert all(torch.equal(x, y) for x, y in zip(answers(mapped), outside, strict=True))
    assert all(torch.equal(table_of(m), b) for m, b in zip(members, before, strict=True))
    assert not torch.equal(*outside)


def test_a_table_that_may_not_shrink_stays_whole() -> None:
    made, rows = tiny.checkpoint(), texts(12, USED)
    with compacted(made.model, [rows], pad_id=50_000) as (same,):  # all rows below it would have to stay
        assert same is rows
        assert len(table_of(made.model)) == SIZE

    class NoTables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = made.model

        def token_tables(self) -> list[nn.Embedding]:
            return []

    with compacted(NoTables(), [rows], 0) as (same,):
        assert same is rows
        assert len(table_of(made.model)) == SIZE


def test_a_table_that_other_modules_read_stays_whole() -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = AutoConfig.for_model("bart", vocab_size=SIZE, d_model=16, max_position_embeddings=42, **sizes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = texts(6, USED)
    # Its classifier reads the last end token, which every row must hold once.
    rows = Encoded(np.where(rows.ids == 3, 2, rows.ids * (rows.ids != 2)), rows.type_ids, rows.offsets, None)

    def logits(encoded: Encoded) -> torch.Tensor:
        batch = batching.collate(encoded, np.arange(len(encoded)), 1)
        with torch.no_grad():
            found: torch.Tensor = model(**model_inputs(model, batch, CPU)).logits
        return found

    outside = logits(rows)
    with compacted(model, [rows], 1) as (mapped,):
        assert torch.equal(logits(mapped), outside)


def test_a_factorised_table_is_shrunk_by_its_tokens_and_comes_back_whole() -> None:
    made = tiny.checkpoint()
    table = transforms.factorise_table(made.model, "bert.embeddings.word_embeddings", 5)
    before = table.token_embeddings.weight.detach().clone()
    rows = texts(8, USED)
    batch = model_inputs(made.model, batching.collate(rows, range(8), made.pad_id), CPU)
    with torch.no_grad():
        dense = made.model(**batch).logits
    with compacted(made.model, [rows], made.pad_id) as (small,):
        assert table.num_embeddings < SIZE
        few = model_inputs(made.model, batching.collate(small, range(8), made.pad_id), CPU)
        with torch.no_grad():
            torch.testing.assert_close(made.model(**few).logits, dense)
        table.token_embeddings.weight.data += 1
    used = np.union1d(rows.ids, np.arange(made.pad_id + 1))
    changed = (table.token_embeddings.weight.detach() - before).abs().sum(1) > 0
    assert set(np.flatnonzero(changed.numpy())) == set(used)
