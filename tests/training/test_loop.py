"""The loop: it learns, it is reproducible, and an interruption changes nothing."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcli.data import sources
from kdcli.errors import ExitCode, InputError, InterruptedRun, UsageError
from kdcli.inputs import text
from kdcli.progress import Progress, ProgressTask
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.training import loop, parameter_groups
from kdcli.training.label_loss import hard, label_loss
from kdcli.training.loop import Batch, FitOptions, fit, learning_rate
from kdcli.training.resume import ResumePoint
from kdcli.training.side_by_side import Together
from tests import tiny

CPU = torch.device("cpu")
OPTIONS = FitOptions(epochs=4, batch_size=16, lr=5e-3, seed=3)


@pytest.fixture(scope="module")
def rows(data_dir: Path):
    dataset = sources.load(str(data_dir))
    tok = tiny.tokenizer()
    index = {name: i for i, name in enumerate(tiny.LABELS)}
    return {name: text.encode(split, tok, 40, index) for name, split in dataset.splits.items()}


def train(made, rows, options=OPTIONS, **more):
    labels = rows["train"].labels
    return fit(
        made.model,
        rows["train"],
        rows["validation"],
        more.pop("loss", label_loss(CLASSIFICATION, labels, CPU)),
        options,
        pad_id=made.pad_id,
        device=CPU,
        progress=more.pop("progress", Progress()),
        title="training",
        **more,
    )


def state(made) -> bytes:
    return b"".join(v.numpy().tobytes() for v in made.model.state_dict().values())


class Notes(Progress):
    """Remembers notes, and calls back with every reading of a task: one comes after each validation."""

    def __init__(self, at_reading=lambda detail: None) -> None:
        self.lines: list[str] = []
        self.at_reading = at_reading

    def note(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def task(self, title: str, total: int):
        task = ProgressTask()
        task.advance = lambda steps=1, detail="": self.at_reading(detail)
        yield task


def with_table_of(made, seed: int):
    """Another model, but for its token table: tokens that never occur are in no resume point."""
    again = tiny.checkpoint(seed=seed)
    again.model.get_input_embeddings().load_state_dict(made.model.get_input_embeddings().state_dict())
    return again


def test_it_learns_and_keeps_the_best_epoch(rows) -> None:
    made = tiny.untrained()
    result = train(made, rows, FitOptions(epochs=12, batch_size=16, lr=5e-3))
    assert result.best_score >= 0.9  # one telling word a sentence; chance is 0.5
    best = max(result.history, key=lambda e: (e["validation_accuracy"], -e["validation_loss"]))
    assert result.best_epoch == best["epoch"]
    assert result.tokens_per_s > 0
    assert 0 <= result.padding_share < 0.35
    assert not made.model.training


def test_same_seed_same_bytes_other_seed_other_bytes(rows) -> None:
    one, two, three = tiny.checkpoint(), tiny.checkpoint(), tiny.checkpoint()
    train(one, rows)
    train(two, rows)
    train(three, rows, FitOptions(epochs=4, batch_size=16, lr=5e-3, seed=4))
    assert state(one) == state(two)
    assert state(one) != state(three)


@pytest.mark.parametrize("stop_at", [1, 6, 8, 23])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(rows, tmp_path: Path, stop_at: int, number: int) -> None:
    whole = tiny.checkpoint()
    expected = train(whole, rows)
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), number)

    cut = tiny.checkpoint()
    point = ResumePoint(tmp_path / "point", {"data": "x"})
    with pytest.raises(InterruptedRun) as raised:
        train(cut, rows, resume=point, after_step=interrupt)
    assert raised.value.exit_code == (
        ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
    )
    assert {p.suffix for p in (tmp_path / "point").iterdir()} == {".json", ".safetensors"}  # never pickle
    again = with_table_of(tiny.checkpoint(), seed=99)  # whatever it was, the resume point decides
    result = train(again, rows, resume=ResumePoint(tmp_path / "point", {"data": "x"}), resuming=True)
    assert state(again) == state(whole)
    assert result.history == expected.history


def test_a_signal_during_the_last_validation_is_not_lost(rows, tmp_path: Path) -> None:
    def interrupt(detail: str) -> None:
        if detail.startswith("epoch 4/4 loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    whole, cut = tiny.checkpoint(), tiny.checkpoint()
    expected = train(whole, rows)
    with pytest.raises(InterruptedRun, match="stopped after epoch 4") as raised:
        train(cut, rows, resume=ResumePoint(tmp_path / "point", {}), progress=Notes(interrupt))
    assert raised.value.exit_code == ExitCode.TERMINATED
    again = with_table_of(tiny.checkpoint(), seed=99)
    result = train(again, rows, resume=ResumePoint(tmp_path / "point", {}), resuming=True)
    assert state(again) == state(whole)
    assert result.history == expected.history


def test_a_training_that_had_ended_is_not_run_again(rows, tmp_path: Path) -> None:
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    whole, notes = tiny.checkpoint(), Notes()
    first = train(whole, rows, resume=ResumePoint(tmp_path / "point", {}), after_step=count)
    assert steps == first.steps == 24
    again = with_table_of(tiny.checkpoint(), seed=99)
    point = ResumePoint(tmp_path / "point", {})
    second = train(again, rows, resume=point, resuming=True, after_step=count, progress=notes)
    assert steps == 24  # none was made
    assert notes.lines == ["training: had ended"]
    assert state(again) == state(whole)
    assert not again.model.training
    assert second.history == first.history
    assert (second.steps, second.best_epoch, second.best_score) == (
        first.steps,
        first.best_epoch,
        first.best_score,
    )
    # Without resuming it starts again, and the old point is gone.
    train(tiny.checkpoint(), rows, resume=ResumePoint(tmp_path / "point", {}), after_step=count)
    assert steps == 48


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 4)])
def test_the_epoch_that_is_kept(rows, monkeypatch: pytest.MonkeyPatch, keep, kept: int) -> None:
    made, after = tiny.checkpoint(), []
    accuracies = iter([0.5, 0.9, 0.8, 0.7])

    def judged(_, model, *more):
        # The layers only: of the table, the loop shows the rows that occur.
        after.append({k: v.clone() for k, v in model.state_dict().items() if ".layer." in k})
        return next(accuracies), 0.1

    monkeypatch.setattr(loop, "evaluate", judged)
    result = train(made, rows, FitOptions(epochs=4, batch_size=16, lr=5e-3, seed=3, keep=keep))
    assert (result.epochs, result.best_epoch) == (4, kept)
    assert result.best_score == [0.5, 0.9, 0.8, 0.7][kept - 1]
    weights = made.model.state_dict()
    same = [all(torch.equal(weights[k], epoch[k]) for k in epoch) for epoch in after]
    assert same == [number == kept for number in (1, 2, 3, 4)]


def test_patience_has_no_say_where_the_last_epoch_is_kept(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    for keep, epochs in (("best", 2), ("last", 4)):
        monkeypatch.setattr(loop, "evaluate", lambda *_: (0.5, 0.1))
        options = FitOptions(epochs=4, batch_size=48, lr=5e-3, keep=keep, patience=1)
        assert train(tiny.checkpoint(), rows, options).epochs == epochs


def test_progress_rises_from_zero_to_below_one(rows) -> None:
    seen: list[Batch] = []
    targets = torch.from_numpy(rows["train"].labels)

    def loss(output, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return hard(CLASSIFICATION, output.logits, targets[torch.from_numpy(batch.rows)])

    train(tiny.checkpoint(), rows, FitOptions(epochs=3, batch_size=20, lr=5e-3), loss=loss)
    assert len(seen) == 15  # 96 rows are 4 batches of 20 and one of 16
    assert [batch.progress for batch in seen] == pytest.approx([i / 15 for i in range(15)])
    lengths = rows["train"].lengths
    for batch in seen:
        assert (batch.mask.sum(1).numpy() == lengths[batch.rows]).all()
    for epoch in range(3):
        once = np.concatenate([batch.rows for batch in seen[5 * epoch : 5 * epoch + 5]])
        assert sorted(once) == list(range(96))


def test_rates_scale_the_steps_of_models_side_by_side(rows) -> None:
    members = [tiny.checkpoint() for _ in range(3)]
    before = {k: v.clone() for k, v in members[0].model.state_dict().items()}
    both = Together([m.model for m in members], [0], [1.0, 0.25, 0.0])
    made = SimpleNamespace(model=both, pad_id=0)
    targets = torch.from_numpy(rows["train"].labels)

    def loss(output, batch: Batch) -> torch.Tensor:
        return sum(hard(CLASSIFICATION, z, targets[torch.from_numpy(batch.rows)]) for z in output.every)

    # One step; without dropout equal members have equal gradients.
    for module in both.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    train(made, rows, FitOptions(epochs=1, batch_size=96, lr=1e-2, weight_decay=0.0), loss=loss)
    whole, quarter, none = (
        {k: v - before[k] for k, v in m.model.state_dict().items() if v.is_floating_point()} for m in members
    )
    assert max(float(v.abs().max()) for v in whole.values()) == pytest.approx(1e-2, rel=1e-3)  # AdamW's first
    for name in whole:
        # Differences of float32 weights up to 1: rounding of 6e-8 in each of them.
        assert torch.allclose(quarter[name], whole[name] / 4, atol=5e-7), name
        assert (none[name] == 0).all(), name


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = tiny.checkpoint().model
    frozen = model.get_submodule("bert.encoder.layer.0")
    frozen.requires_grad_(False)
    matrices, vectors = parameter_groups.of(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    found = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert found == {id(p) for p in model.parameters()} - {id(p) for p in frozen.parameters()}


def test_a_changed_run_refuses_to_resume_and_says_why(rows, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    with pytest.raises(InterruptedRun):
        train(
            made,
            rows,
            resume=ResumePoint(tmp_path / "point", {"data": "x", "lr": 1}),
            after_step=lambda: os.kill(os.getpid(), signal.SIGINT),
        )
    with pytest.raises(UsageError, match="differs from the interrupted one in lr"):
        train(made, rows, resume=ResumePoint(tmp_path / "point", {"data": "x", "lr": 2}), resuming=True)


def test_a_broken_resume_point_is_an_input_error(rows, tmp_path: Path) -> None:
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / "state.json").write_text("{")
    with pytest.raises(InputError, match="is broken"):
        train(tiny.checkpoint(), rows, resume=ResumePoint(tmp_path / "point", {}), resuming=True)


def test_a_loss_that_is_not_finite_stops(rows) -> None:
    with pytest.raises(InputError, match="loss became nan"):
        train(tiny.checkpoint(), rows, loss=lambda output, _: output.logits.sum() * float("nan"))


def test_early_stop(rows) -> None:
    # Zero rate: no epoch is better than the first.
    result = train(tiny.checkpoint(), rows, FitOptions(epochs=30, batch_size=32, lr=1e-30, patience=2))
    assert result.epochs == 3
    assert result.best_epoch == 1


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 100, OPTIONS) for step in range(100)]
    assert max(rates) == pytest.approx(OPTIONS.lr)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < OPTIONS.lr / 50


def test_a_crash_while_a_point_is_replaced_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os as system

    point = ResumePoint(tmp_path / "point", {"data": "x"})
    point.save({"a": torch.zeros(1)}, {"step": 1})
    real, calls = system.replace, []

    def crash_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("kdcli.atomic.os.replace", crash_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            point.save({"a": torch.ones(1)}, {"step": 2})
    stored = ResumePoint(tmp_path / "point", {"data": "x"}).load()
    assert stored is not None
    assert stored[1] == {"step": 1}
    point.save({"a": torch.ones(1)}, {"step": 3})
    assert point.load()[1] == {"step": 3}


def test_the_seed_draws_the_batches(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = loop.batching.train_batches

    def train_batches(lengths, size, seed, epoch):
        asked.append((seed, epoch))
        return real(lengths, size, seed, epoch)

    monkeypatch.setattr(loop.batching, "train_batches", train_batches)
    train(tiny.checkpoint(), rows, FitOptions(epochs=2, batch_size=48, lr=1e-4, seed=7))
    assert asked == [(7, 0), (7, 1)]
