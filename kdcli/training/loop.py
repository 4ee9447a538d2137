"""One training loop, for fine-tuning, distillation and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import interrupts, processes
from kdcli.errors import InterruptedRun
from kdcli.inputs import batching
from kdcli.inputs.feeding import model_inputs, real
from kdcli.inputs.text import Encoded
from kdcli.interrupts import Steps
from kdcli.progress import Progress
from kdcli.report import metrics
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task
from kdcli.training import distributed, number_head, parameter_groups, usable
from kdcli.training.compact import compacted
from kdcli.training.divergence import FEW, Divergence
from kdcli.training.resume import ResumePoint, pack_optimizer, unpack_optimizer


@dataclass(frozen=True)
class Batch:
    """What a loss knows of a batch besides the model's output on it."""

    rows: np.ndarray  # (B,) positions among the training rows
    mask: Tensor  # (B, T) bool, True on real tokens
    progress: float  # share of the training that is done, in [0, 1)


BatchLoss = Callable[[Any, Batch], Tensor]
"""(model output, batch) -> scalar, a mean over the batch's rows."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to train. AdamW, linear warm-up, linear decay to zero."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps
    clip: float = 1.0  # largest gradient norm
    patience: int | None = None  # epochs without a better validation before stopping early
    keep: Literal["best", "last"] = "best"  # which epoch's weights are the result
    seed: int = 0
    rate_option: str = "--lr"  # that sets the rate, for messages


@dataclass
class FitResult:
    """What a training did."""

    epochs: int  # that were run
    best_epoch: int  # from 1; its weights are in the model
    best_score: float  # of the metric, on the validation rows
    steps: int
    seconds: float
    tokens_per_s: float  # real tokens, padding not counted
    padding_share: float
    history: list[dict[str, float]] = field(default_factory=list)
    metric: str = "accuracy"

    def detail(self) -> dict[str, Any]:
        """For the report, where the best score is a value of the metric and goes by its name."""
        found = asdict(self)
        metric = found.pop("metric")
        shown, of_epoch = metrics.of(metric).of_score, f"validation_{metric}"
        found["best_score"] = shown(self.best_score)
        found["history"] = [row | {of_epoch: shown(row[of_epoch])} for row in self.history]
        return {f"best_{metric}" if name == "best_score" else name: value for name, value in found.items()}


def learning_rate(step: int, steps: int, options: FitOptions) -> float:
    """Rate of the 0-based ``step``: rises linearly over the warm-up, then falls linearly to zero."""
    warm = max(1, round(options.warmup * steps))
    if step < warm:
        return options.lr * (step + 1) / warm
    return options.lr * max(0.0, (steps - step) / max(1, steps - warm))


def fit(
    model: nn.Module,
    train: Encoded,
    validation: Encoded,
    loss: BatchLoss,
    options: FitOptions,
    *,
    pad_id: int,
    device: torch.device,
    progress: Progress,
    title: str,
    resume: ResumePoint | None = None,
    resuming: bool = False,
    after_step: Callable[[], None] | None = None,
    extra: nn.Module | None = None,
    begin: Callable[[Encoded], None] | None = None,
    task: Task = CLASSIFICATION,
) -> FitResult:
    """Train ``model`` in place and leave the weights of its best epoch in it, in eval mode.

    Batches are cut by length and padded to their own longest row; of the token table only the rows that occur
    are trained. The same seed, data and machine give the same weights byte for byte, also across an
    interruption and a resume; a training that had ended is not run again. Several processes share every
    batch; the weights are the same in all of them after every step.

    Args:
        model: Any transformers classifier.
        train: Tokenised training rows; ``loss`` knows their targets by row index.
        validation: Tokenised validation rows with labels; they choose the best epoch by the task's primary metric.
        loss: Scalar loss of one batch, a mean over its rows.
        options: Rates, epochs, seed.
        pad_id: Token id of padding.
        device: Where the model is.
        progress: Observer.
        title: What to call this training.
        resume: Where resume points go; None keeps none.
        resuming: Continue from the stored point when there is one.
        after_step: Called after every optimizer step (to keep pruned weights at zero, for example).
        extra: Further parameters that the loss trains and nobody keeps; its children with ``tensors`` and
            ``restore`` have state of their own, which goes into resume points.
        begin: Called once before the first step, with the training rows in the token ids that the model has
            while it trains, for whoever runs it in between.
        task: What a label is.

    Raises:
        InterruptedRun: SIGINT or SIGTERM arrived; the resume point holds the state after the last step.
        InputError: Its rows can teach or choose nothing, or it diverged: see :mod:`kdcli.training.divergence`.
    """
    usable.check(task, train, validation, model)
    with compacted(model, [train, validation], pad_id) as (compact_train, compact_validation):
        if begin is not None:
            begin(compact_train)
        run = _Run(
            model, extra or nn.Module(), loss, options, pad_id, device, title, resume, after_step, task
        )
        return run.run(compact_train, compact_validation, progress, resuming)


@dataclass
class _Run:
    """One training: what stays the same from step to step."""

    model: nn.Module
    extra: nn.Module
    loss: BatchLoss
    options: FitOptions
    pad_id: int
    device: torch.device
    title: str
    resume: ResumePoint | None
    after_step: Callable[[], None] | None
    task: Task

    def run(self, train: Encoded, validation: Encoded, progress: Progress, resuming: bool) -> FitResult:
        options, resume = self.options, self.resume
        unit = number_head.deviation(self.task, train.labels)
        groups = parameter_groups.of(self.model, options.weight_decay, unit)
        groups += parameter_groups.of(self.extra, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=_fused(self.device))
        self.parameters = [p for group in groups for p in group["params"]]
        state = self.begin(progress, resuming)
        per_epoch = -(-len(train) // options.batch_size)
        lengths = train.lengths
        checking = inference(validation, options.batch_size * 4, self.pad_id)
        divergence = Divergence(
            self.title, options.lr, options.rate_option, validation.labels, self.task, unit
        )
        before = None
        if state.fresh and per_epoch * options.epochs <= FEW:
            before = evaluate(self.task, self.model, validation, checking, self.device, unit)[1]
        with (
            interrupts.stepping() as interrupt,
            progress.task(self.title, per_epoch * options.epochs) as task,
        ):
            task.advance(state.epoch * per_epoch + state.step)
            while not state.done:
                batches = batching.train_batches(lengths, options.batch_size, options.seed, state.epoch)
                self.model.train()
                started = time.perf_counter()
                while state.step < len(batches):
                    rows = batches[state.step]
                    at = state.epoch * per_epoch + state.step
                    value, stop = self.step(train, rows, at, per_epoch * options.epochs, interrupt)
                    if state.first_loss is None:
                        state.first_loss = float(distributed.total(value)) / processes.count()
                    if self.device.type == "cpu" and processes.count() == 1:
                        # Elsewhere every step would wait for it, and the others for one that stops alone.
                        divergence.of_step(float(value), state.epoch + 1, state.step + 1)
                    state.count(value, int(lengths[rows].sum()), len(rows) * int(lengths[rows].max()))
                    task.advance(1, f"epoch {state.epoch + 1}/{options.epochs}")
                    if stop:
                        state.seconds += time.perf_counter() - started
                        self.stop(state, interrupt)
                state.seconds += time.perf_counter() - started
                mean = state.end_epoch()
                divergence.of_step(mean, state.epoch)
                score, validation_loss = evaluate(
                    self.task, self.model, validation, checking, self.device, unit
                )
                divergence.of_step(validation_loss, state.epoch, what="validation loss")
                state.judge(self.model, score, validation_loss, mean, options, self.task.primary)
                if state.done:
                    divergence.of_result(state.first_loss, state.history[state.best_epoch - 1], before)
                reached = metrics.of(self.task.primary).of_score(score)
                reading = f"epoch {state.epoch}/{options.epochs} loss {mean:.3f} validation {reached:.3f}"
                task.advance(0, reading)
                # Several processes agree on it, as after a step.
                signalled = torch.tensor(float(interrupt.signal is not None), device=self.device)
                if distributed.total(signalled) > 0:
                    self.stop(state, interrupt)
                if resume is not None:
                    self.keep(resume, state)
        assert state.best is not None
        self.model.load_state_dict(state.best)
        self.model.eval()
        return state.result(self.task.primary)

    def begin(self, progress: Progress, resuming: bool) -> _TrainingState:
        """Where to go on: at the resume point, or at a first step."""
        state, resume = _TrainingState(), self.resume
        if resume is not None:
            stored = resume.load() if resuming else None
            if stored is not None:
                state = _restore(self, *stored)
                where = (
                    "had ended" if state.done else f"resumed at epoch {state.epoch + 1}, step {state.step}"
                )
                progress.note(f"{self.title}: {where}")
            elif not resuming and processes.first():
                resume.clear()
        if state.fresh:
            torch.manual_seed(self.options.seed + processes.rank())
        return state

    def step(
        self, train: Encoded, rows: np.ndarray, at: int, steps: int, interrupt: Steps
    ) -> tuple[Tensor, bool]:
        """One optimizer step on a global batch; returns its loss and whether a signal has arrived."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(at, steps, self.options)
        own, factor = distributed.share(rows)
        collated = batching.collate(train, own, self.pad_id)
        inputs = model_inputs(self.model, collated, self.device)
        mask = real(collated, self.device)
        value = factor * self.loss(self.model(**inputs), Batch(own, mask, at / steps))
        value.backward()
        stop = distributed.average(self.parameters, interrupt.signal is not None)
        parameter_groups.without_unit(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.after_step is not None:
            self.after_step()
        # A signal that arrived during the step stops a single process now, several after their next one.
        return value.detach(), stop or (processes.count() == 1 and interrupt.signal is not None)

    def keep(self, resume: ResumePoint, state: _TrainingState) -> None:
        """Write a resume point; every process takes part, the first one writes."""
        tensors, plain = _snapshot(self, state)
        if processes.first():
            resume.save(tensors, plain)

    def stop(self, state: _TrainingState, interrupt: Steps) -> None:
        """Keep the resume point and end."""
        import signal

        hint = None
        if self.resume is not None:
            self.keep(self.resume, state)
            hint = "the same command with --resume continues after the last step"
        after = (
            f"in epoch {state.epoch + 1} after step {state.step}"
            if state.step
            else f"after epoch {state.epoch}"
        )
        raise InterruptedRun(
            f"{self.title} stopped {after}",
            hint,
            terminated=interrupt.signal not in (None, signal.SIGINT),
        )


@torch.inference_mode()
def evaluate(
    task: Task,
    model: Any,
    encoded: Encoded,
    batches: list[tuple[np.ndarray, Mapping[str, np.ndarray]]],
    device: torch.device,
    deviation: float = 1.0,
) -> tuple[float, float]:
    """What the task chooses models by, and the mean loss, of ``model`` on labelled rows.

    The loss is that of numbers without their unit, where ``deviation`` says it.
    """
    model.eval()
    assert encoded.labels is not None
    every: Tensor | None = None
    total = 0.0
    for rows, batch in batches[processes.rank() :: processes.count()]:
        logits = model(**model_inputs(model, batch, device)).logits.float()
        labels = torch.from_numpy(encoded.labels[rows]).to(device)
        own, theirs = (number_head.without_unit(one, deviation) for one in (logits, labels))
        total += float(task.loss(own, theirs, "sum"))
        if every is None:
            every = logits.new_zeros(len(encoded), logits.shape[1])
        every[torch.from_numpy(rows).to(device)] = logits
    if processes.count() > 1:  # each has filled in its own rows
        if every is None:
            every = torch.zeros(len(encoded), int(model.config.num_labels), device=device)
        every = distributed.total(every)
        total = float(distributed.total(torch.tensor(total, device=device)))
    assert every is not None
    return task.selection_score(every.cpu().numpy(), encoded.labels, encoded.queries), total / len(encoded)


def inference(encoded: Encoded, size: int, pad_id: int) -> list[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
    """Row indices and arrays of batches for :func:`evaluate`, longest rows first."""
    return [
        (rows, batching.collate(encoded, rows, pad_id))
        for rows in batching.inference_batches(encoded.lengths, size)
    ]


def _fused(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


@dataclass
class _TrainingState:
    """Where a training stands; everything here is in a resume point."""

    epoch: int = 0  # that is being run, from 0
    step: int = 0  # that comes next in it
    steps: int = 0
    tokens: int = 0
    cells: int = 0
    seconds: float = 0.0
    done: bool = False
    best_epoch: int = 0
    best_score: float = float("-inf")
    best_loss: float = float("inf")
    first_loss: float | None = None  # of the first step
    history: list[dict[str, float]] = field(default_factory=list)
    fresh: bool = True
    best: dict[str, Tensor] | None = None
    #: Loss summed on the device: reading it every step would wait for the device every step.
    running: Tensor | None = None

    def count(self, value: Tensor, tokens: int, cells: int) -> None:
        value = value.double()
        self.running = value if self.running is None else self.running + value
        self.step, self.steps = self.step + 1, self.steps + 1
        self.tokens, self.cells = self.tokens + tokens, self.cells + cells

    def end_epoch(self) -> float:
        mean = float("nan")
        if self.running is not None:
            mean = float(distributed.total(self.running)) / processes.count() / max(self.step, 1)
        self.running, self.step, self.epoch = None, 0, self.epoch + 1
        return mean

    def result(self, metric: str) -> FitResult:
        """Of a training that has ended."""
        return FitResult(
            epochs=self.epoch,
            best_epoch=self.best_epoch,
            best_score=self.best_score,
            steps=self.steps,
            seconds=round(self.seconds, 3),
            tokens_per_s=round(self.tokens / max(self.seconds, 1e-9), 1),
            padding_share=round(1 - self.tokens / max(self.cells, 1), 4),
            history=self.history,
            metric=metric,
        )

    def judge(
        self,
        model: nn.Module,
        score: float,
        validation_loss: float,
        mean: float,
        options: FitOptions,
        metric: str,
    ) -> None:
        """Keep the weights when they are the best so far, and decide whether this was the last epoch.

        Of equal scores the lower loss is better.
        """
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": round(mean, 6),
                f"validation_{metric}": round(score, 6),
                "validation_loss": round(validation_loss, 6),
            }
        )
        better = self.best is None or (score, -validation_loss) > (self.best_score, -self.best_loss)
        if better or options.keep == "last":
            self.best_epoch, self.best_score, self.best_loss = self.epoch, score, validation_loss
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        stale = options.patience is not None and self.epoch - self.best_epoch >= options.patience
        self.done = self.epoch >= options.epochs or stale


_PLAIN = (
    "epoch",
    "step",
    "steps",
    "tokens",
    "cells",
    "seconds",
    "done",
    "best_epoch",
    "first_loss",
    "history",
)


def _snapshot(run: _Run, state: _TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"best.{k}": v for k, v in (state.best or {}).items()}
    for name, child in _with_own_state(run.extra):
        tensors |= {f"own.{name}/{k}": v for k, v in child.tensors().items()}
    if (
        not state.done
    ):  # of a training that has ended only the result is needed, and what was decided on the way
        tensors |= {f"model.{k}": v for k, v in run.model.state_dict().items()}
        tensors |= {f"extra.{k}": v for k, v in run.extra.state_dict().items()}
        tensors |= pack_optimizer(run.optimizer)
        states = distributed.each(torch.get_rng_state())
        tensors |= {f"rng.cpu.{rank}": s for rank, s in enumerate(states)}
        if torch.cuda.is_available():
            tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        if state.running is not None:
            tensors["running"] = state.running.reshape(1)
    plain = {name: getattr(state, name) for name in _PLAIN}
    for name in ("best_score", "best_loss"):  # JSON has no infinity
        value = getattr(state, name)
        plain[name] = value if np.isfinite(value) else None
    return tensors, plain


def _restore(run: _Run, tensors: dict[str, Tensor], plain: dict[str, Any]) -> _TrainingState:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    score, loss = plain.pop("best_score", plain.pop("best_accuracy", None)), plain.pop("best_loss")
    state = _TrainingState(**plain, fresh=False)
    state.best_score = state.best_score if score is None else score
    state.best_loss = state.best_loss if loss is None else loss
    state.best = {k: v.to(run.device) for k, v in part("best.").items()} or None
    for name, child in _with_own_state(run.extra):
        child.restore(part(f"own.{name}/"))
    if state.done:
        return state
    run.model.load_state_dict(part("model."))
    run.extra.load_state_dict(part("extra."))
    unpack_optimizer(run.optimizer, tensors)
    torch.set_rng_state(tensors[f"rng.cpu.{processes.rank()}"])
    if cuda := part("rng.cuda."):
        torch.cuda.set_rng_state_all([cuda[str(i)] for i in range(len(cuda))])
    if "running" in tensors:
        state.running = tensors["running"].to(run.device)[0]
    return state


def _with_own_state(extra: nn.Module) -> list[tuple[str, Any]]:
    """Children that keep more than parameters, such as a discriminator with its optimizer."""
    return [(name, child) for name, child in extra.named_children() if hasattr(child, "tensors")]
