"""One training loop, for fine-tuning, distillation and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import batching
from kdcli.data.text import Encoded
from kdcli.errors import InputError, InterruptedRun
from kdcli.progress import Progress
from kdcli.training.batches import model_inputs
from kdcli.training.interrupt import Interrupt, interruptible
from kdcli.training.resume import ResumePoint, pack_optimizer, unpack_optimizer

Loss = Callable[[Any, np.ndarray], Tensor]
"""(model output, row indices (B,)) -> scalar."""


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
    seed: int = 0


@dataclass
class FitResult:
    """What a training did."""

    epochs: int  # that were run
    best_epoch: int  # from 1; its weights are in the model
    best_accuracy: float  # on the validation rows
    steps: int
    seconds: float
    tokens_per_s: float  # real tokens, padding not counted
    padding_share: float
    history: list[dict[str, float]] = field(default_factory=list)

    def detail(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and tables only: shrinking biases and norms towards zero has no meaning."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


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
    loss: Loss,
    options: FitOptions,
    *,
    pad_id: int,
    device: torch.device,
    progress: Progress,
    title: str,
    resume: ResumePoint | None = None,
    resuming: bool = False,
    after_step: Callable[[], None] | None = None,
) -> FitResult:
    """Train ``model`` in place and leave the weights of its best epoch in it, in eval mode.

    Batches are cut by length and padded to their own longest row. The same seed, data and machine give
    the same weights byte for byte, also across an interruption and a resume.

    Args:
        model: Any transformers classifier.
        train: Tokenised training rows; ``loss`` knows their targets by row index.
        validation: Tokenised validation rows with labels; they choose the best epoch.
        loss: Scalar loss of one batch.
        options: Rates, epochs, seed.
        pad_id: Token id of padding.
        device: Where the model is.
        progress: Observer.
        title: What to call this training.
        resume: Where resume points go; None keeps none.
        resuming: Continue from the stored point when there is one.
        after_step: Called after every optimizer step (to keep pruned weights at zero, for example).

    Raises:
        InterruptedRun: SIGINT or SIGTERM arrived; the resume point holds the state after the last step.
        InputError: The loss became NaN or infinite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.lr, fused=_fused(device)
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    state = _State()
    if resume is not None:
        stored = resume.load() if resuming else None
        if stored is not None:
            state = _restore(model, optimizer, *stored)
            progress.note(f"{title}: resumed at epoch {state.epoch + 1}, step {state.step}")
        elif not resuming:
            resume.clear()
    if state.fresh:
        torch.manual_seed(options.seed)
    per_epoch = -(-len(train) // options.batch_size)
    steps = per_epoch * options.epochs
    lengths = train.lengths
    checking = inference(validation, options.batch_size * 4, pad_id)
    with interruptible() as interrupt, progress.task(title, steps) as task:
        task.advance(state.epoch * per_epoch + state.step)
        while state.epoch < options.epochs:
            batches = batching.train_batches(lengths, options.batch_size, options.seed, state.epoch)
            model.train()
            started = time.perf_counter()
            while state.step < len(batches):
                rows = batches[state.step]
                rate = learning_rate(state.epoch * per_epoch + state.step, steps, options)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = batching.collate(train, rows, pad_id)
                value = loss(prepared(**model_inputs(model, batch, device)), rows)
                accelerator.backward(value)
                accelerator.clip_grad_norm_(prepared.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if after_step is not None:
                    after_step()
                state.count(value.detach(), int(lengths[rows].sum()), batch["input_ids"].size)
                task.advance(1, f"epoch {state.epoch + 1}/{options.epochs}")
                if interrupt.signal is not None:
                    state.seconds += time.perf_counter() - started
                    _stop(resume, model, optimizer, state, interrupt, title)
            state.seconds += time.perf_counter() - started
            mean = state.end_epoch()
            if not np.isfinite(mean):
                raise InputError(
                    f"{title}: the loss became {mean} in epoch {state.epoch}",
                    "try a lower --lr, or check the data",
                )
            accuracy, validation_loss = evaluate(model, validation, checking, device)
            better = state.judge(model, accuracy, validation_loss, mean)
            task.advance(0, f"epoch {state.epoch}/{options.epochs} loss {mean:.3f} validation {accuracy:.3f}")
            if resume is not None and state.epoch < options.epochs:
                resume.save(*_snapshot(model, optimizer, state))
            if (
                options.patience is not None
                and not better
                and state.epoch - state.best_epoch >= options.patience
            ):
                break
    assert state.best is not None
    model.load_state_dict(state.best)
    model.eval()
    return FitResult(
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        best_accuracy=state.best_accuracy,
        steps=state.steps,
        seconds=round(state.seconds, 3),
        tokens_per_s=round(state.tokens / max(state.seconds, 1e-9), 1),
        padding_share=round(1 - state.tokens / max(state.cells, 1), 4),
        history=state.history,
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    encoded: Encoded,
    batches: list[tuple[np.ndarray, Mapping[str, np.ndarray]]],
    device: torch.device,
) -> tuple[float, float]:
    """Accuracy and mean cross entropy of ``model`` on labelled rows."""
    model.eval()
    assert encoded.labels is not None
    right, total = 0, 0.0
    for rows, batch in batches:
        logits = model(**model_inputs(model, batch, device)).logits.float()
        labels = torch.from_numpy(encoded.labels[rows]).to(device)
        right += int((logits.argmax(1) == labels).sum())
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
    return right / len(encoded), total / len(encoded)


def inference(encoded: Encoded, size: int, pad_id: int) -> list[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
    """Row indices and arrays of batches for :func:`evaluate`, longest rows first."""
    return [
        (rows, batching.collate(encoded, rows, pad_id))
        for rows in batching.inference_batches(encoded.lengths, size)
    ]


def _fused(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


@dataclass
class _State:
    """Where a training stands; everything here is in a resume point."""

    epoch: int = 0  # that is being run, from 0
    step: int = 0  # that comes next in it
    steps: int = 0
    tokens: int = 0
    cells: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
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
        mean = float(self.running) / max(self.step, 1) if self.running is not None else float("nan")
        self.running, self.step, self.epoch = None, 0, self.epoch + 1
        return mean

    def judge(self, model: nn.Module, accuracy: float, validation_loss: float, mean: float) -> bool:
        """Keep the weights when they are the best so far; of equal accuracies the lower loss is better."""
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": round(mean, 6),
                "validation_accuracy": round(accuracy, 6),
                "validation_loss": round(validation_loss, 6),
            }
        )
        better = (accuracy, -validation_loss) > (self.best_accuracy, -self.best_loss)
        if better:
            self.best_epoch, self.best_accuracy, self.best_loss = self.epoch, accuracy, validation_loss
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        return better


_PLAIN = ("epoch", "step", "steps", "tokens", "cells", "seconds", "best_epoch", "best_accuracy", "history")


def _snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: _State
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | pack_optimizer(optimizer)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if state.running is not None:
        tensors["running"] = state.running.reshape(1)
    tensors |= {f"best.{k}": v for k, v in (state.best or {}).items()}
    plain = {name: getattr(state, name) for name in _PLAIN}
    plain["best_loss"] = state.best_loss if np.isfinite(state.best_loss) else None
    return tensors, plain


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> _State:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    device = next(model.parameters()).device
    model.load_state_dict(part("model."))
    unpack_optimizer(optimizer, tensors)
    torch.set_rng_state(tensors["rng.cpu"])
    if cuda := part("rng.cuda."):
        torch.cuda.set_rng_state_all([cuda[str(i)] for i in range(len(cuda))])
    loss = plain.pop("best_loss")
    state = _State(**plain, fresh=False, best_loss=float("inf") if loss is None else loss)
    state.best = {k: v.to(device) for k, v in part("best.").items()} or None
    if "running" in tensors:
        state.running = tensors["running"].to(device)[0]
    return state


def _stop(
    resume: ResumePoint | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: _State,
    interrupt: Interrupt,
    title: str,
) -> None:
    import signal

    hint = None
    if resume is not None:
        resume.save(*_snapshot(model, optimizer, state))
        hint = "the same command with --resume continues after the last step"
    raise InterruptedRun(
        f"{title} stopped in epoch {state.epoch + 1} after step {state.step}",
        hint,
        terminated=interrupt.signal == signal.SIGTERM,
    )
