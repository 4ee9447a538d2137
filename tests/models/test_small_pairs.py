"""Students without a transformer keep the two texts of a pair apart, wherever they are cut, padded or renumbered."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.data.readers import Rows
from kdcli.export import onnx as exporter
from kdcli.export import sessions
from kdcli.inputs import reading
from kdcli.inputs.text import TEXT, Encoded, encode
from kdcli.models import students
from kdcli.models.aliases import SMALL_STUDENTS
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.tokens import border, keep_tokens
from kdcli.stages.distill.options import STUDENT_PRESETS
from kdcli.training.compact import compacted
from tests import tiny
from tests.models import test_small
from tests.models.test_small import CLOSE

TOKENIZER = tiny.tokenizer()
CLS, SEP, PAD = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.pad_token_id


def made(kind: str, pairs: bool = True) -> Checkpoint:
    return test_small.made(kind, pair_token_id=SEP if pairs else None)


def batch(*rows: tuple[list[int], list[int]], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask of pairs of texts, between the special tokens."""
    whole = [[CLS, *a, SEP, *b, SEP] for a, b in rows]
    width = max(map(len, whole)) + extra
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in whole])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])


ROWS = [([8, 9, 10], [11]), ([12], [8, 9, 13, 14]), ([], [9, 9]), ([20, 21], [])]


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor) -> np.ndarray:
    found: np.ndarray = model(input_ids=ids, attention_mask=mask).logits.numpy()
    return found


def head(model: nn.Module, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Logits (C,) of the two summaries in float64."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    read = np.concatenate([u, v, np.abs(u - v), u * v])
    if "dense.weight" in w:
        inner = w["dense.weight"] @ read + w["dense.bias"]
        read = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner])
    return w["classifier.weight"] @ read + w["classifier.bias"]


def test_static_is_u_v_their_difference_and_their_product() -> None:
    model = made("static").model
    table = model.get_input_embeddings().weight.detach().double().numpy()  # type: ignore[operator]

    def summary(ids: list[int]) -> np.ndarray:
        mean = table[ids].mean(0)
        centred = mean - mean.mean()
        norm: Any = model.norm
        scale, shift = (p.detach().double().numpy() for p in (norm.weight, norm.bias))
        return np.asarray(centred / math.sqrt((centred**2).mean() + 1e-5) * scale + shift)

    for row, (a, b) in zip(logits(model, *batch(*ROWS)), ROWS, strict=True):
        np.testing.assert_allclose(row, head(model, summary([CLS, *a, SEP]), summary([*b, SEP])), **CLOSE)


def test_cnn_and_bilstm_read_the_row_and_pool_each_text() -> None:
    """Windows and states may reach over the border; what is summed up may not."""
    for kind in ("cnn", "bilstm"):
        model: Any = made(kind).model
        for (a, b), row in zip(ROWS, logits(model, *batch(*ROWS)), strict=True):
            ids, mask = batch((a, b))
            with torch.no_grad():
                states = model.states(model.word_embeddings(ids), mask.bool())[0].double().numpy()
            states = states if kind == "bilstm" else states.T  # (T, F)
            one, two = states[: len(a) + 2], states[len(a) + 2 :]
            pooled = [
                part.max(0) if kind == "cnn" else np.concatenate([part.max(0), part.mean(0)])
                for part in (one, two)
            ]
            np.testing.assert_allclose(row, head(model, *pooled), **CLOSE)


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_padding_changes_nothing_and_the_border_counts(kind: str) -> None:
    model = made(kind).model
    together = logits(model, *batch(*ROWS, extra=5))
    for row, pair in zip(together, ROWS, strict=True):
        np.testing.assert_allclose(row, logits(model, *batch(pair))[0], **CLOSE)
    moved = logits(model, *batch(([8, 9], [10, 11])))  # the same tokens as in the first row, cut elsewhere
    assert np.abs(moved - together[0]).max() > 0.01


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_the_graph_needs_no_segments(kind: str, tmp_path: Path) -> None:
    """Some tokenizers give none, so the border is read off the ids."""
    one = made(kind)
    file = tmp_path / "model.onnx"
    exporter.export(
        one.model, TEXT.example(one.config.vocab_size, ["input_ids", "attention_mask"], "cpu"), file
    )
    run = sessions.runner(sessions.open_session(file, threads=1, spinning=False))
    for rows, extra in ((ROWS, 0), (ROWS, 4), (ROWS[:1], 0)):
        ids, mask = batch(*rows, extra=extra)
        found = run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        np.testing.assert_allclose(found, logits(one.model, ids, mask), **CLOSE)


def test_the_border_is_found_under_any_number() -> None:
    """The separator gets another id while few tokens are trained, and for good where tokens are dropped."""
    one = made("static")
    ids, mask = batch(*ROWS[:2])
    before = logits(one.model, ids, mask)
    lengths = mask.sum(1).numpy()
    rows = Encoded(
        ids[mask.bool()].numpy().astype(np.int32), None, np.concatenate([[0], np.cumsum(lengths)]), None
    )
    with compacted(one.model, [rows], one.pad_id) as (mapped,):
        small_ids = torch.full_like(ids, one.pad_id)
        small_ids[mask.bool()] = torch.from_numpy(mapped.ids).long()
        assert not torch.equal(small_ids, ids)
        np.testing.assert_array_equal(logits(one.model, small_ids, mask), before)
    np.testing.assert_array_equal(logits(one.model, ids, mask), before)
    unused = [13, 14]  # they occur in the second row alone
    kept = [i for i in range(len(TOKENIZER)) if i not in unused and i != 1]
    keep_tokens(one.model, kept)
    assert one.config.pair_token_id == kept.index(SEP) != SEP
    renumbered = torch.tensor([[kept.index(int(i)) for i in ids[0, :7]]])
    np.testing.assert_allclose(logits(one.model, renumbered, mask[:1, :7]), before[:1], **CLOSE)


def build(name: str, pairs: bool, teacher: Checkpoint | None = None) -> students.Student:
    return students.build(
        name, teacher or tiny.checkpoint(), tiny.LABELS, STUDENT_PRESETS,
        init="teacher", seed=0, hub=Path, resolve=Path, pairs=pairs,
    )  # fmt: skip


def test_a_student_of_pairs_is_made_for_pairs_alone(tmp_path: Path) -> None:
    assert build("static-8", False).checkpoint.config.pair_token_id is None
    one = build("static-8", True).checkpoint
    assert one.config.pair_token_id == SEP
    again = tiny.reload(one, tmp_path)
    np.testing.assert_array_equal(logits(again.model, *batch(*ROWS)), logits(one.model, *batch(*ROWS)))


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_that_a_student_was_not_made_for_are_told(pairs: bool) -> None:
    one, two = Rows(["good film"] * 3), Rows(["good film"] * 3, second=["the plot", "", "it was"])
    made_for, others = (two, one) if pairs else (one, two)
    student = made("static", pairs)

    def told(rows: Rows) -> list[str]:
        found = reading.told(student, {"test": encode(rows, TOKENIZER, 40, None)})
        return [one.message for one in found if one.code == "other-texts"]

    assert told(made_for) == []
    (message,) = told(others)
    assert message.startswith(f"3 of 3 rows of test have {'one text' if pairs else 'two texts'}")
    with_layers = replace(tiny.checkpoint(), tokenizer=TOKENIZER)
    assert reading.told(with_layers, {"test": encode(two, TOKENIZER, 40, None)}) == []


def test_a_tokenizer_without_a_separator_marks_the_border_by_its_end() -> None:
    ids = {"sep_token_id": None, "eos_token_id": 1}
    assert border(SimpleNamespace(**ids)) == 1
    assert border(SimpleNamespace(**ids | {"sep_token_id": 0})) == 0
    assert border(SimpleNamespace(sep_token_id=None, eos_token_id=None)) is None


def test_a_token_id_that_is_none_stays_none_of_them_in_training() -> None:
    one = made("static")
    one.config.bos_token_id = -1  # as some configurations write none
    rows = Encoded(np.array([len(TOKENIZER) - 1], np.int32), None, np.array([0, 1]), None)
    with compacted(one.model, [rows], one.pad_id):
        assert one.config.bos_token_id == -1
    assert (one.config.bos_token_id, one.config.pair_token_id) == (-1, SEP)


@pytest.mark.parametrize(("name", "said"), [("1x16", True), ("1x32", False), ("static-8", False)])
def test_layers_from_nothing_are_called_slow_on_pairs(name: str, said: bool) -> None:
    """The teacher is 2x32: a student of that width takes over a layer of it."""
    teacher = build("2x32", False).checkpoint
    assert any("learn slowly" in note for note in build(name, True, teacher).notes) == said
    assert not any("learn slowly" in note for note in build(name, False, teacher).notes)


def test_whether_two_texts_agree_is_learned_from_texts_kept_apart() -> None:
    """What it is for: half of the pairs are a text and its own words shuffled. New texts are judged."""
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(len(TOKENIZER)), [CLS, SEP, PAD])

    def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, same = [], np.arange(count) % 2
        for equal in same:
            a = rng.choice(words, 4, replace=False)
            b = rng.permutation(a) if equal else rng.choice(np.setdiff1d(words, a), 4, replace=False)
            rows.append((a.tolist(), b.tolist()))
        return *batch(*rows), torch.from_numpy(same)

    train, test = pairs(256), pairs(200)
    right = {}
    for apart in (False, True):
        model: Any = made("static", apart).model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(*train[:2]).logits, train[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right[apart] = float((logits(model.eval(), *test[:2]).argmax(1) == test[2].numpy()).mean())
    # 200 rows: a share of one half has a standard error of 0.035, and a difference of two such at most 0.05.
    assert right[True] > 0.85
    assert right[True] - right[False] > 0.15
