"""The loop: it learns, it is reproducible, and an interruption changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from kdcli.data import sources, text
from kdcli.errors import ExitCode, InputError, InterruptedRun, UsageError
from kdcli.progress import Progress
from kdcli.training.loop import FitOptions, fit, learning_rate
from kdcli.training.losses import cross_entropy
from kdcli.training.resume import ResumePoint
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
        more.pop("loss", cross_entropy(labels, CPU)),
        options,
        pad_id=made.pad_id,
        device=CPU,
        progress=Progress(),
        title="training",
        **more,
    )


def state(made) -> bytes:
    return b"".join(v.numpy().tobytes() for v in made.model.state_dict().values())


def test_it_learns_and_keeps_the_best_epoch(rows) -> None:
    made = tiny.untrained()
    result = train(made, rows, FitOptions(epochs=12, batch_size=16, lr=5e-3))
    assert result.best_accuracy >= 0.9  # one telling word a sentence; chance is 0.5
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
    again = tiny.checkpoint(seed=99)  # whatever it was, the resume point decides ...
    # ... but for tokens that never occur: nothing trains them, and they are in no resume point.
    again.model.get_input_embeddings().load_state_dict(
        tiny.checkpoint().model.get_input_embeddings().state_dict()
    )
    result = train(again, rows, resume=ResumePoint(tmp_path / "point", {"data": "x"}), resuming=True)
    assert state(again) == state(whole)
    assert result.history == expected.history


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
