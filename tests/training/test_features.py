"""The teacher's signals are the same from disk and recomputed, and are computed once."""

from __future__ import annotations

import copy
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli import cache
from kdcli.data import sources
from kdcli.errors import UsageError
from kdcli.families.stack import encoder_layers
from kdcli.inputs import batching, text
from kdcli.inputs.text import Encoded
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.training import features
from kdcli.training.features import TeacherSignals, combined
from kdcli.training.loop import Batch
from kdcli.training.terms import Needs, Signals
from tests import tiny

CPU = torch.device("cpu")
EVERYTHING = Needs(True, frozenset({0, 2, 3}), frozenset({2}))
HALF = 2**-11  # relative error of rounding to half precision
FLOAT = 1e-4  # float32 through three layers, summed in other orders because the batches differ


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoints.load(tiny.saved(tmp_path_factory.mktemp("features") / "teacher", layers=3))


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> Encoded:
    index = {name: i for i, name in enumerate(tiny.LABELS)}
    return text.encode(sources.load(str(data_dir)).splits["train"], tiny.tokenizer(), 40, index)


def made(teacher: Checkpoint, rows: Encoded, needs: Needs, budget: int = 1 << 30) -> TeacherSignals:
    logits = np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
    return TeacherSignals(teacher, rows, logits, needs, budget=budget, device=CPU, progress=Progress())


def batch_of(rows: Encoded, at: list[int], wider: int = 0) -> Batch:
    """A batch as the student sees it, some tokens wider than its longest row."""
    indices = np.array(at)
    width = int(rows.lengths[indices].max()) + wider
    mask = torch.from_numpy(batching.collate(rows, indices, 0, width=width)["attention_mask"]).bool()
    assert (~mask).any()
    return Batch(indices, mask, 0.0)


@contextmanager
def passes(teacher: Checkpoint) -> Iterator[list[int]]:
    """Count forward passes of the teacher."""
    seen: list[int] = []
    handle = teacher.model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def stored_files() -> list[Path]:
    return sorted((cache.root() / "features").glob("*/*"))


def reference(teacher: Checkpoint, rows: Encoded, batch: Batch) -> list[torch.Tensor]:
    """transformers' own hidden states (B, T, D) of the batch."""
    inputs = batching.collate(rows, batch.rows, teacher.pad_id, width=batch.mask.shape[1])
    given = {k: torch.from_numpy(inputs[k]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return list(teacher.model(**given, output_hidden_states=True).hidden_states)


def test_disk_gives_what_recomputing_gives(teacher: Checkpoint, rows: Encoded) -> None:
    same = replace(teacher, model=copy.deepcopy(teacher.model))  # its passes end early until it is closed
    disk, live = made(teacher, rows, EVERYTHING), made(same, rows, EVERYTHING, budget=0)
    assert (disk.stored.how, live.stored.how) == ("on disk", "recomputed")
    # Layers 0 to 3, 1 among them, from which the queries of layer 2 are made; and 96 vectors in float32.
    assert disk.stored.bytes == 4 * len(rows.ids) * 32 * 2 + len(rows) * 32 * 4
    for batch in (batch_of(rows, [5, 0, 71, 12]), batch_of(rows, [95, 3], wider=4)):
        compare(teacher, rows, batch, disk(batch), live(batch))


def compare(teacher: Checkpoint, rows: Encoded, batch: Batch, disk: Signals, live: Signals) -> None:
    mask, shown = batch.mask, reference(teacher, rows, batch)
    for found in (disk, live):
        assert torch.equal(found.logits[:, 0], torch.from_numpy(2.0 * batch.rows).float())
        assert found.mask is mask
        assert sorted(found.hidden) == [0, 2, 3]  # not the layer that only the queries needed
        assert found.pooled is not None
        assert torch.allclose(found.pooled, shown[3][:, 0], atol=FLOAT)  # stored in float32
        assert all(not value.requires_grad for value in found.hidden.values())
    for number in (0, 2, 3):
        want = shown[number][mask]
        assert torch.allclose(live.hidden[number][mask], want, atol=FLOAT)
        error = (disk.hidden[number][mask] - want).abs()
        assert (error <= HALF * want.abs() + FLOAT).all()
        assert (disk.hidden[number][~mask] == 0).all()
        assert disk.hidden[number].dtype == torch.float32
    layer = encoder_layers(teacher.model, teacher.family)[1]
    for name in ("query", "key", "value"):
        one, two = getattr(disk, name), getattr(live, name)
        assert list(one) == list(two) == [2]
        assert one[2].shape == two[2].shape == (len(batch.rows), 4, mask.shape[1], 8)
        projection: Any = getattr(layer, name)
        want = projection(shown[1]).detach().unflatten(-1, (4, 8)).transpose(1, 2)
        # What the rounding of the states below can make of a sum of products, at most.
        bound = (HALF * shown[1].abs()) @ projection.weight.detach().abs().T
        bound = bound.unflatten(-1, (4, 8)).transpose(1, 2)
        at = mask[:, None, :, None]
        assert torch.allclose(torch.where(at, two[2], 0), torch.where(at, want, 0), atol=FLOAT)
        assert (torch.where(at, (one[2] - want).abs() - bound, 0) <= FLOAT).all()


def test_the_teacher_runs_once(teacher: Checkpoint, rows: Encoded) -> None:
    needs = Needs(hidden=frozenset({1, 2}))
    with passes(teacher) as seen:
        first = made(teacher, rows, needs)
        assert seen  # it did run
        seen.clear()
        before = {p.name: p.stat().st_mtime_ns for p in stored_files()}
        assert list(before) == ["hidden-1.npy", "hidden-2.npy"]
        second = made(teacher, rows, needs)
        batch = batch_of(rows, [4, 8])
        assert torch.equal(first(batch).hidden[2], second(batch).hidden[2])
        assert not seen
        assert {p.name: p.stat().st_mtime_ns for p in stored_files()} == before
        # A layer more: only that one is made, and the others are read.
        third = made(teacher, rows, Needs(hidden=frozenset({2, 3})))
        assert seen
        assert [p.name for p in stored_files()] == ["hidden-1.npy", "hidden-2.npy", "hidden-3.npy"]
        assert stored_files()[1].stat().st_mtime_ns == before["hidden-2.npy"]
        assert torch.equal(third(batch).hidden[2], second(batch).hidden[2])


def test_without_a_budget_the_teacher_runs_at_every_step(teacher: Checkpoint, rows: Encoded) -> None:
    layers = teacher.model.get_submodule("bert.encoder.layer")
    tops: list[int] = []
    handle = layers[2].register_forward_hook(lambda *_: tops.append(1))  # type: ignore[index]
    with passes(teacher) as seen:
        live = made(teacher, rows, Needs(hidden=frozenset({1}), attention=frozenset({2})), budget=0)
        assert live.stored.how == "recomputed"
        assert not seen
        for at in ([0, 1], [2, 3], [4, 5]):
            live(batch_of(rows, at, wider=1))
        assert len(seen) == 3
        live.close()
    handle.remove()
    assert not tops  # cut off above the highest layer that is read
    assert not stored_files()
    batch = tiny.batch()
    assert teacher.model(**batch).logits.shape == (5, 2)  # closed: no hook cuts it any more


def test_one_byte_less_than_needed_is_too_little(teacher: Checkpoint, rows: Encoded) -> None:
    needs = Needs(hidden=frozenset({1}))
    size = len(rows.ids) * 32 * 2
    short = made(teacher, rows, needs, budget=size - 1)
    short.close()
    assert (short.stored.how, short.stored.bytes) == ("recomputed", 0)
    enough = made(teacher, rows, needs, budget=size)
    assert (enough.stored.how, enough.stored.bytes) == ("on disk", size)
    assert sum(p.stat().st_size for p in stored_files()) - size in range(1, 1024)  # and a header


def test_a_full_disk_keeps_nothing_but_what_is_there_is_read(
    teacher: Checkpoint, rows: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    roomy, full = usage(1 << 40, 0, 1 << 40), usage(1 << 40, 1 << 40, 0)
    needs = Needs(pooled=True, hidden=frozenset({1}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    live = made(teacher, rows, needs)
    live.close()
    assert live.stored.how == "recomputed"
    assert not stored_files()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)
    assert made(teacher, rows, needs).stored.how == "on disk"
    # The first run may have filled the disk: the resumed one must still read what that one read.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with passes(teacher) as seen:
        assert made(teacher, rows, needs).stored.how == "on disk"
        assert not seen


def test_files_belong_to_a_teacher_and_to_rows(teacher: Checkpoint, rows: Encoded, tmp_path: Path) -> None:
    needs = Needs(hidden=frozenset({1}))
    other = checkpoints.load(tiny.saved(tmp_path / "other", seed=7, layers=3))
    batch = batch_of(rows, [0, 1, 2])
    one, two = made(teacher, rows, needs)(batch), made(other, rows, needs)(batch)
    assert len(stored_files()) == 2
    for found, model in ((one, teacher), (two, other)):
        want = reference(model, rows, batch)[1][batch.mask]
        assert ((found.hidden[1][batch.mask] - want).abs() <= HALF * want.abs() + FLOAT).all()
    fewer = rows.take(np.arange(50, 90))
    batch = batch_of(fewer, [0, 1, 2])
    three = made(teacher, fewer, needs)(batch)
    assert len(stored_files()) == 3
    want = reference(teacher, fewer, batch)[1][batch.mask]
    assert ((three.hidden[1][batch.mask] - want).abs() <= HALF * want.abs() + FLOAT).all()
    # Labels are no part of what a teacher sees: another label budget finds the same file.
    with passes(teacher) as seen:
        made(teacher, Encoded(rows.ids, rows.type_ids, rows.offsets, None), needs)
        assert not seen
    assert len(stored_files()) == 3
    assert not list((cache.root() / "features").glob(".*"))  # nothing half-written


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_layers_that_cannot_be_read_are_refused_at_once(
    teacher: Checkpoint, rows: Encoded, budget: int
) -> None:
    pruned = replace(teacher, model=copy.deepcopy(teacher.model))
    encoder_layers(pruned.model, pruned.family)[1].keep_heads([])
    with passes(pruned) as seen:
        for number, words in ((2, "layer 2 has no attention heads left"), (4, "layer 4 was asked for")):
            with pytest.raises(UsageError, match=words):
                made(pruned, rows, Needs(attention=frozenset({number})), budget)
        assert not seen


def test_an_interruption_leaves_no_half_written_file(
    teacher: Checkpoint, rows: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in teacher.model.modules())

    before = hooks()
    monkeypatch.setattr(features, "run_cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(teacher, rows, Needs(hidden=frozenset({1})))
    assert not list((cache.root() / "features").rglob("*.npy"))
    assert hooks() == before


def test_logits_alone_need_no_teacher(teacher: Checkpoint, rows: Encoded) -> None:
    with passes(teacher) as seen:
        found = made(teacher, rows, Needs())
        answer = found(batch_of(rows, [3, 1]))
        assert not seen
    assert found.stored.how == "not read"
    assert answer.logits.tolist() == [[6.0, 7.0], [2.0, 3.0]]
    assert answer.pooled is None
    assert not answer.hidden
    assert not answer.query


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_combined_logits_have_the_mean_of_the_probabilities(temperature: float) -> None:
    rng = np.random.default_rng(0)
    every = [(rng.normal(size=(6, 4)) * scale).astype(np.float32) for scale in (1, 3, 8)]
    weights = [0.5, 0.3, 0.2]
    made = combined(every, weights, temperature)
    want = np.zeros((6, 4))
    for i in range(6):
        for logits, weight in zip(every, weights, strict=True):
            want[i] += weight * softmax(logits[i].astype(np.float64) / temperature)
    # The result is float32: 1e-7 of logits of up to 40, in the exponent.
    assert np.allclose(softmax(made.astype(np.float64) / temperature), want, atol=1e-5)
    assert made.dtype == np.float32
    mean_of_logits = softmax(sum(w * z for w, z in zip(weights, every, strict=True)) / temperature)
    assert not np.allclose(mean_of_logits, want, atol=1e-2)  # the mistake that it is not


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_teacher_combined_is_itself_up_to_a_constant_a_row(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32) * 4
    difference = combined([logits], [1.0], temperature) - logits
    assert np.allclose(difference, difference[:, :1], atol=1e-5)  # float32 logits of about 10
    assert np.abs(difference).max() > 0.1


def test_combined_stays_finite_where_a_probability_vanishes() -> None:
    made = combined([np.array([[500.0, -500.0]])] * 2, [0.5, 0.5], 1.0)
    assert np.isfinite(made).all()
    assert made[0, 0] > made[0, 1]
