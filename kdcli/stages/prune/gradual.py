"""``--schedule gradual``: prune along a cubic schedule while the dense input model teaches what is left.

    s_t = s_f * (1 - (1 - t)^3)

with t from 0 to 1 over the first part of the training: much goes early, while the model has time to recover
(Zhu, Gupta 2017, arXiv:1710.01878, eq. 1, from zero). What goes is judged again before every cut, and stays
away. Nothing has another shape before the training has ended: until then heads and neurons are masked, so
that the optimiser's state stays what it is and a training that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.context import Context
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.inputs.feeding import Labelled
from kdcli.inputs.text import Encoded
from kdcli.models import transforms
from kdcli.progress import Progress
from kdcli.stages.prune import rows_read
from kdcli.stages.prune.budget import cut_of
from kdcli.stages.prune.criterion import UnitJob, UnitsCut, WeightJob
from kdcli.stages.prune.plan import PrunePlan
from kdcli.training.recovery import BATCH_SIZE, recover

CUTS = 8
SPAN = 2 / 3  # of all steps; the rest trains on without cuts


def share(t: float) -> float:
    """How much of what will go has gone at t in [0, 1] of the schedule."""
    return 1 - (1 - min(max(t, 0.0), 1.0)) ** 3


def cuts(steps: int) -> dict[int, float]:
    """Step after which a cut is made -> how much has gone then; fewer cuts than usual in a short training.

    >>> cuts(6)
    {1: 0.578125, 2: 0.947265625, 3: 0.984375, 4: 1.0}
    """
    at = {max(1, round(SPAN * steps * k / CUTS)): share(k / CUTS) for k in range(1, CUTS + 1)}
    return at if steps else {}


class _Schedule(nn.Module):
    """Counts steps and cuts when it is time; a child of what :func:`kdcli.training.loop.fit` trains along.

    Args:
        model: That is trained.
        when: Of :func:`cuts`.
    """

    def __init__(self, model: nn.Module, when: Mapping[int, float]) -> None:
        super().__init__()
        self.when, self.step, self.trace = dict(when), 0, list[dict[str, Any]]()
        self._model = [model]  # in a list, so that its parameters are not this module's

    def cut(self, share: float) -> dict[str, Any]:
        """Take more away, so that ``share`` of what will go has gone; returns what to report."""
        raise NotImplementedError

    def masks(self) -> dict[str, Tensor]:
        """What stays."""
        raise NotImplementedError

    def put(self, masks: Mapping[str, Tensor]) -> None:
        """Undo :meth:`masks`."""
        raise NotImplementedError

    def hold(self) -> None:
        """After every step."""

    def after_step(self) -> None:
        self.step += 1
        if self.step in self.when:
            model = self._model[0]
            model.eval()
            self.trace.append({"step": self.step, **self.cut(self.when[self.step])})
            model.train()
        self.hold()

    def tensors(self) -> dict[str, Tensor]:
        """For resume points."""
        rows = [[float(v) for v in row.values()] for row in self.trace]
        trace = torch.tensor(rows, dtype=torch.float64) if rows else torch.zeros(0, 0)
        return {"step": torch.tensor([self.step]), "trace": trace, **self.masks()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        self.step = int(tensors["step"][0])
        self.trace = [
            {name: kind(value) for (name, kind), value in zip(self.columns.items(), row, strict=True)}
            for row in tensors["trace"].tolist()
        ]
        self.put({k: v for k, v in tensors.items() if k not in ("step", "trace")})

    columns: ClassVar[Mapping[str, type]] = {}  # of the trace


class UnitMasks(_Schedule):
    """Heads and neurons that are masked while the model trains.

    Args:
        job: Over the live model; its ``remove`` is the end of the schedule.
        judge: Cuts a model like the job says, one-shot.
        when: Of :func:`cuts`.
    """

    columns: ClassVar = {"step": int, "heads": int, "neurons": int}

    def __init__(self, job: UnitJob, judge: Callable[[UnitJob], UnitsCut], when: Mapping[int, float]) -> None:
        super().__init__(job.model, when)
        self.job, self.judge = job, judge
        self.start = job.price(job.layers)
        self.kept = [[np.arange(len(x)) for x in part] for part in (self.start.heads, self.start.neurons)]
        self.batches: Sequence[Labelled] = job.batches
        self.applied: list[list[Tensor]] = []  # for the hooks: L of (H,) and L of (F,), 1 where a unit stays
        self.sync()

    def cut(self, share: float) -> dict[str, Any]:
        family = self.job.layers[0].family
        with self.bare():
            model = copy.deepcopy(self.job.model)
        transforms.apply(model, cut_of(self.kept, self.start))
        layers = encoder_layers(model, family)
        left = float(self.start.only(self.job.structure).flat().sum()) - self.job.remove * share
        now = float(self.job.price(layers).only(self.job.structure).flat().sum())
        if now > left:
            job = replace(
                self.job,
                model=model,
                layers=layers,
                remove=now - left,
                batches=self.batches,
                iterative=False,
                memo={},
                progress=Progress(),
            )
            found = self.judge(job).cut
            for part, cut in zip(self.kept, (found.heads, found.neurons), strict=True):
                for i, units in cut.items():
                    part[i] = part[i][units]
            self.sync()
        heads, neurons = (sum(map(len, part)) for part in self.kept)
        return {"heads": heads, "neurons": neurons}

    def masks(self) -> dict[str, Tensor]:
        return {
            f"{number}.{i}": torch.from_numpy(x).to(torch.int64)
            for number, part in enumerate(self.kept)
            for i, x in enumerate(part)
        }

    def put(self, masks: Mapping[str, Tensor]) -> None:
        self.kept = [
            [masks[f"{number}.{i}"].cpu().numpy() for i in range(len(part))]
            for number, part in enumerate(self.kept)
        ]
        self.sync()

    def sync(self) -> None:
        """Make the hooks' masks from what is kept."""
        self.applied = []
        for part, had in zip(self.kept, (self.start.heads, self.start.neurons), strict=True):
            made = []
            for layer, kept, all_ in zip(self.job.layers, part, had, strict=True):
                mask = torch.zeros(len(all_), device=next(layer.module.parameters()).device)
                mask[torch.from_numpy(kept)] = 1
                made.append(mask)
            self.applied.append(made)

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """Hold the masks on the live model inside the block."""
        self.hooks: list[Any] = []
        self._install()
        try:
            yield
        finally:
            self._remove()

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Take the hooks off for a moment: a copy of the model must not keep them."""
        self._remove()
        try:
            yield
        finally:
            self._install()

    def _install(self) -> None:
        for layer in self.job.layers:
            if layer.heads:
                self._hook(layer.attention_output, 0, layer, layer.head_size)
            if layer.neurons:
                self._hook(layer.ffn_out, 1, layer, 1)

    def _hook(self, module: nn.Module, part: int, layer: Layer, width: int) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask = self.applied[part][layer.index]
            return (args[0].unflatten(-1, (-1, width)).mul(mask[:, None]).flatten(-2), *args[1:])

        self.hooks.append(module.register_forward_pre_hook(hook))

    def _remove(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


class WeightMasks(_Schedule):
    """Weights that are held at zero while the model trains.

    Args:
        job: Over the live model; its pattern's share is the end of the schedule.
        judge: Says which weights of a model stay, like the job says.
        when: Of :func:`cuts`.
    """

    columns: ClassVar = {"step": int, "zero_share": float}

    def __init__(
        self, job: WeightJob, judge: Callable[[WeightJob], Mapping[str, Tensor]], when: Mapping[int, float]
    ) -> None:
        super().__init__(job.model, when)
        self.job, self.judge = job, judge
        self.batches: Sequence[Labelled] = job.batches
        self.kept = {
            name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in job.matrices.items()
        }

    def cut(self, share: float) -> dict[str, Any]:
        pattern = replace(self.job.pattern, sparsity=self.job.pattern.sparsity * share)
        found = self.judge(replace(self.job, pattern=pattern, batches=self.batches, progress=Progress()))
        self.kept = {name: self.kept[name] & found[name] for name in self.kept}
        self.hold()
        zeros = sum(int((layer.weight == 0).sum()) for layer in self.job.matrices.values())
        return {"zero_share": zeros / sum(layer.weight.numel() for layer in self.job.matrices.values())}

    def hold(self) -> None:
        with torch.no_grad():
            for name, layer in self.job.matrices.items():
                layer.weight.masked_fill_(~self.kept[name], 0.0)

    def masks(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def put(self, masks: Mapping[str, Tensor]) -> None:
        self.kept = {name: mask.to(self.kept[name].device) for name, mask in masks.items()}


def units(context: Context, plan: PrunePlan, job: UnitJob) -> tuple[UnitsCut, dict[str, Any]]:
    """Train the model of ``job`` for the epochs of ``plan`` while its heads and neurons go, then cut them out.

    Returns:
        The cut, with the units left after each step that cut, and what to report of the training.
    """
    schedule = UnitMasks(job, lambda one: plan.criterion.prune(one, plan.config), cuts(_steps(context, plan)))
    with schedule.masked():
        recovery = _train(context, plan, schedule)
    found = UnitsCut(cut_of(schedule.kept, schedule.start), schedule.trace)
    transforms.apply(job.model, found.cut)
    return found, recovery


def weights(
    context: Context, plan: PrunePlan, job: WeightJob
) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Train the model of ``job`` for the epochs of ``plan`` while its weights become zero.

    Returns:
        True where a weight stays, the share of zeros after each step that cut, and what to report of the
        training.
    """
    schedule = WeightMasks(
        job, lambda one: plan.criterion.zero(one, plan.config), cuts(_steps(context, plan))
    )
    recovery = _train(context, plan, schedule)
    return schedule.kept, schedule.trace, recovery


def _train(context: Context, plan: PrunePlan, schedule: UnitMasks | WeightMasks) -> dict[str, Any]:
    def begin(train: Encoded) -> None:
        if schedule.batches:
            inner = replace(context, encoded={"train": train})
            schedule.batches = rows_read.batches(inner, plan.config.samples, plan.config.batch_size)

    extra = nn.Module()
    extra.add_module("pruning", schedule)
    # Of several epochs the first ones have the better accuracy and the wrong size.
    return recover(
        context, **plan.training, after_step=schedule.after_step, extra=extra, begin=begin, keep="last"
    )


def _steps(context: Context, plan: PrunePlan) -> int:
    size = plan.training["batch_size"] or BATCH_SIZE
    return int(plan.training["epochs"]) * -(-len(context.encoded["train"]) // size)
