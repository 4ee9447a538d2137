"""Factorising the matrices of an encoder: statistics, ranks, and the table of what was done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import memory
from kdcli.context import Context
from kdcli.inputs import kinds
from kdcli.inputs.text import Encoded
from kdcli.models import mapped
from kdcli.probe import from_layer, speedup
from kdcli.probe import rows as calibration
from kdcli.probe.moments import Moments
from kdcli.probe.product_clock import Clock
from kdcli.probe.speedup import Speed
from kdcli.stages.lowrank import (
    curvature,
    evbmf,
    factor_units,
    factors,
    rank_budget,
    search,
    sequential,
    speed,
)
from kdcli.stages.lowrank.curvature import OutputSensitivity
from kdcli.stages.lowrank.factor_units import FactorUnit
from kdcli.stages.lowrank.factors import Factors, Problem
from kdcli.stages.lowrank.rank_budget import Choices, LayerSize, Ranks
from kdcli.stages.lowrank.rule import LinearRule
from kdcli.stages.lowrank.sequential import Fit, Replacement, Sample

_HELD = 4  # one row in four of the calibration rows judges the shares of a budget
_ALONE_ROWS = 64  # held rows on which each layer is factorised alone
_ALLOCATION = ("even", "weighted", "between")


class Work:
    """One factorisation: what is known about the units of a model, and what is decided from it."""

    def __init__(
        self, context: Context, rule: LinearRule, config: Any, units: Mapping[str, FactorUnit]
    ) -> None:
        self.context, self.rule, self.config, self.units = context, rule, config, units
        self.model, self.task = context.checkpoint.model, context.checkpoint.task
        self.sizes: dict[str, LayerSize] = {n: rank_budget.size_of(unit.dense) for n, unit in units.items()}
        self.dense: dict[str, Any] = {
            m: self.model.get_submodule(m) for unit in units.values() for m in unit.members
        }
        self.rows = calibration.sample(context, config.samples)
        self.samples: list[Sample] = []
        self.magnitudes: dict[str, Tensor] = {}
        self.felt = OutputSensitivity({}, [])
        self.fisher: dict[str, tuple[Tensor, Tensor]] = {}
        self.found: dict[str, Factors] = {}
        # Their factors are too much to have beside the model.
        self.large = sum(size.dense for size in self.sizes.values()) >= mapped.LARGE // 4
        self.clock = Clock(max(1, round(float(context.encoded["train"].lengths.mean()))))

    def _give_back(self) -> None:
        if self.large:
            memory.give_back()

    # --- what is known ----------------------------------------------------------------------------

    def problem(self, unit: FactorUnit, moments: Moments) -> Problem:
        """The problem of a unit, with all that its method may read."""
        return factors.problem_of(
            unit.dense,
            moments,
            centred=self.config.centred,
            magnitude=self.magnitudes.get(unit.name),
            sensitivity=self._joined(unit),
            fisher=self._joined_fisher(unit),
        )

    def _last_problem(self, unit: FactorUnit, moments: Moments) -> Problem:
        """The problem of a unit that will not be asked for again."""
        made = self.problem(unit, moments)
        for name in unit.members:
            self.felt.matrices.pop(name, None)
        return made

    def solve(self, problem: Problem, largest: int, *, curves: bool = False) -> Factors:
        """Solve a problem as the method weighs it."""
        metric, flow = self.rule.metrics(problem, self.config)
        return factors.solve(problem, metric, flow, largest=largest, curves=curves)

    def _joined(self, unit: FactorUnit) -> Tensor | None:
        """P^T G P of a unit: that of several layers with the same inputs is the sum of theirs."""
        parts = [self.felt.matrices[m] for m in unit.members if m in self.felt.matrices]
        return sum(parts[1:], parts[0]) if parts else None

    def _joined_fisher(self, unit: FactorUnit) -> tuple[Tensor, Tensor] | None:
        parts = [self.fisher[m] for m in unit.members if m in self.fisher]
        if not parts:
            return None
        return torch.cat([p[0] for p in parts]), torch.stack([p[1] for p in parts]).sum(0)

    def _collect(self, samples: list[Sample]) -> None:
        """Gather the statistics of every unit and decompose it."""
        family = self.context.checkpoint.family
        count = len(self.model.get_submodule(family.layers))  # type: ignore[arg-type]
        for unit in self.units.values():
            if unit.table:
                self._decompose(unit, self._table(unit))
        with self.context.progress.task("calibration", count) as task:
            for moments, sizes in sequential.collect(
                self.model,
                family,
                self.units,
                samples,
                magnitudes="magnitude" in self.rule.needs,
                done=task.advance,
            ):
                self.magnitudes |= sizes
                for name, own in moments.items():
                    self._decompose(self.units[name], own)

    def _decompose(self, unit: FactorUnit, moments: Moments) -> None:
        largest = int(np.ceil(self.sizes[unit.name].break_even)) - 1
        found = self.solve(self.problem(unit, moments), largest, curves=True)
        self.found[unit.name] = factors.in_file(found) if self.large else found

    def _table(self, unit: FactorUnit) -> Moments:
        assert isinstance(unit.dense, nn.Embedding)
        train = self.context.encoded["train"]
        counts = torch.from_numpy(np.bincount(train.ids, minlength=unit.dense.num_embeddings))
        if "magnitude" in self.rule.needs:
            self.magnitudes[unit.name] = (counts + 1) / float(counts.sum() + len(counts))
        return sequential.table_moments(unit.dense, counts)

    def _feel(self, rows: Encoded, samples: list[Sample]) -> list[Sample]:
        """OutputSensitivity of every layer's outputs, and the Fisher information where the method reads it.

        Returns:
            The samples, their tokens weighed where the method weighs them.
        """
        # The rows are in random order, their batches are not: a share of the batches would be the longest rows.
        needed = "sensitivity" in self.rule.needs
        some = samples
        if not needed and len(rows) > rank_budget.GRADIENT_ROWS:
            part = rows.take(np.arange(rank_budget.GRADIENT_ROWS))
            some = [Sample(batch) for batch in calibration.batches(self.context, part)]
        inputs = [sample.inputs for sample in some]
        with self.context.progress.task("sensitivity", len(inputs)) as task:
            self.felt = curvature.sensitivity(
                self.model, self.dense, _counted(inputs, task.advance), self.context.seed, self.task
            )
        if "fisher" in self.rule.needs:
            labelled = [
                (batch, calibration.targets(self.context, rows, at, batch))
                for at, batch in calibration.indexed(self.context, rows)
            ]
            with self.context.progress.task("Fisher information", len(labelled)) as task:
                self.fisher = curvature.fisher(
                    self.model, self.dense, _counted(labelled, task.advance), self.task
                )
        power = self.config.token_power if self.rule.weighs_tokens else 0.0
        if not needed or not power:
            return samples
        return [
            Sample(one.inputs, {name: size**power for name, size in sizes.items()})
            for one, sizes in zip(samples, self.felt.tokens, strict=True)
        ]

    # --- how many directions ----------------------------------------------------------------------

    def decide(self, amount: Mapping[str, Any], detail: dict[str, Any]) -> Ranks:
        """Collect statistics and settle every unit's rank; None where it stays dense."""
        detail |= {"rows": len(self.rows), "tokens": int(self.rows.lengths.sum())}
        if not self.units:
            return {}
        shared = bool({"budget", "target_speedup", "max_drop"} & set(amount))
        count = max(1, len(self.rows) // _HELD) if shared else 0
        held, fit = (self.rows.take(part) for part in np.split(np.arange(len(self.rows)), [count]))
        samples = [Sample(batch) for batch in calibration.batches(self.context, fit)]
        trial = calibration.batches(self.context, held)
        if shared or {"sensitivity", "fisher"} & self.rule.needs:
            samples = self._feel(fit, samples)
        self.samples = samples
        self._give_back()
        self._collect(samples)
        self._give_back()
        if not shared:
            return {n: self.sizes[n].settle(max(1, self._wanted(n, amount))) for n in self.units}
        damage = self._damage(held, detail)
        if "target_speedup" in amount:
            return self._for_speedup(damage, amount["target_speedup"], detail)
        dense = calibration.logits(self.model, trial)
        if "max_drop" in amount:
            return self._search(damage, amount["max_drop"], dense, trial, detail)
        return self._shared(damage, amount["budget"], dense, trial, detail)

    def _wanted(self, name: str, amount: Mapping[str, Any]) -> int:
        if "energy" in amount:
            return self.found[name].rank(amount["energy"])
        if amount["rank"] != "evbmf":
            return int(amount["rank"])
        return evbmf.rank(self.units[name].dense.weight.detach())

    def _damage(self, held: Encoded, detail: dict[str, Any]) -> dict[str, np.ndarray]:
        """Divergence of the model with each unit alone factorised, at every rank: predicted, then measured."""
        rows = held.take(np.arange(min(_ALONE_ROWS, len(held))))
        batches = calibration.batches(self.context, rows)
        family = self.context.checkpoint.family
        states = from_layer.states_of(self.model, family, batches)
        damage = {}
        measured: dict[str, dict[int, float]] = {}
        with self.context.progress.task("each layer alone", len(self.units)) as task:
            for name, unit in self.units.items():
                curve = self.found[name].damage
                assert curve is not None
                rank = max(1, int(self.sizes[name].break_even / 2))
                factor_units.install(self.model, unit, self.found[name], rank)
                behind: Any = contextlib.nullcontext()  # a table is in front of all layers
                if not unit.table:
                    layer = int(name.removeprefix(family.layers + ".").partition(".")[0])
                    behind = from_layer.starting_at(self.model, family, layer, states.inputs[layer])
                with behind:
                    found = rank_budget.divergence(self.task, self.model, states.logits, batches)
                self._dense(unit)
                measured[name] = {rank: found}
                damage[name] = rank_budget.scaled(curve, [rank], [found])
                task.advance()
        detail["alone"] = {"rows": len(rows), "kl": measured}
        return damage

    def _shared(
        self,
        damage: Mapping[str, np.ndarray],
        budget: float,
        dense: list[Tensor],
        trial: list[dict[str, Tensor]],
        detail: dict[str, Any],
    ) -> Ranks:
        """The best of three shares of a budget, judged on held rows by the factors before they are fitted."""
        even = rank_budget.even(self.sizes, budget)
        weighed = rank_budget.by_damage(self.sizes, damage, budget)
        middle = rank_budget.between(self.sizes, even, weighed)
        shares = dict(zip(_ALLOCATION, (even, weighed, middle), strict=True))
        divergence: dict[str, float] = {}
        with self.context.progress.task("shares of the budget", len(shares)) as task:
            for name, ranks in shares.items():
                self._install(ranks)
                divergence[name] = rank_budget.divergence(self.task, self.model, dense, trial)
                self._dense()
                task.advance()
        best = min(divergence, key=divergence.__getitem__)  # the first of equals, so the even one
        rows = sum(kinds.size(batch) for batch in trial)
        detail["allocation"] = {"chosen": best, "held_rows": rows, "kl": divergence}
        return shares[best]

    def _for_speedup(self, damage: Mapping[str, np.ndarray], target: float, detail: dict[str, Any]) -> Ranks:
        """The least damage among the ranks with which the finished graph is so much faster."""
        if (earlier := speed.resumed(self.context, detail)) is not None:
            return earlier
        options: dict[str, Choices] = {}
        with self.context.progress.task("latencies", len(self.units)) as task:
            for name, unit in self.units.items():
                size = self.sizes[name]
                before = self._milliseconds(unit, None)
                ranks = np.arange(1, int(np.ceil(size.break_even)))
                grid = (
                    ranks[np.unique(np.linspace(0, len(ranks) - 1, 9).astype(int))] if len(ranks) else ranks
                )
                times = [self._milliseconds(unit, int(rank)) for rank in grid]
                cost = np.maximum.accumulate(np.interp(ranks, grid, times)) if len(ranks) else np.zeros(0)
                faster = cost < before  # a slower pair is never chosen
                options[name] = Choices(
                    [*ranks[faster].tolist(), None],
                    np.append(cost[faster], before),
                    np.append(damage[name][ranks[faster]], 0.0),
                )
                task.advance()

        def measure(picked: Ranks) -> Speed:
            # The speed is that of the shapes: what is fitted later only changes the numbers in them.
            self._install(picked)
            found = speedup.against_input(self.context, self.context.checkpoint)
            self._dense()
            return found

        whole = self.clock.model(self.context)
        return speed.choose(self.context, target, options, whole, measure, detail)

    def _search(
        self,
        damage: Mapping[str, np.ndarray],
        max_drop: float,
        dense: list[Tensor],
        trial: list[dict[str, Tensor]],
        detail: dict[str, Any],
    ) -> Ranks:
        """The smallest budget that loses at most ``max_drop`` of the primary metric on validation rows."""

        def shared(budget: float) -> Ranks:
            return self._shared(damage, budget, dense, trial, {})

        def put(ranks: Ranks) -> None:
            self.replace({n: r for n, r in ranks.items() if r is not None})

        found = search.smallest(self.context, max_drop, shared, put, self._dense, detail)
        return dict.fromkeys(self.units) if found is None else found

    # --- putting factors in -----------------------------------------------------------------------

    def replace(self, ranks: Mapping[str, int], *, last: bool = False) -> dict[str, float]:
        """Install the units of ``ranks`` one behind the other; returns their measured errors.

        With ``last`` there is no way back: what is not needed any more is given up on the way.
        """
        if not ranks:
            return {}
        fit = Fit(self.config.sequential, self.config.ridge) if self.rule.fits else Fit("off", 1.0)
        if last:
            self.dense.clear()
            for name, unit in self.units.items():
                if name not in ranks or (fit.mode != "off" and not unit.table):  # they are solved anew
                    none = torch.zeros(0)
                    self.found[name] = dataclasses.replace(self.found[name], left=none, right=none)
        family = self.context.checkpoint.family
        with self.context.progress.task("replacing", len(self.model.get_submodule(family.layers))) as task:  # type: ignore[arg-type]

            def done() -> None:
                task.advance()
                self._give_back()

            problem = self._last_problem if last else self.problem
            job = Replacement(self.units, ranks, self.found, problem, self.solve, fit, spend=last)
            return sequential.replace_all(self.model, family, job, self.samples, done=done)

    def _install(self, ranks: Ranks) -> None:
        for name, rank in ranks.items():
            if rank is not None:
                factor_units.install(self.model, self.units[name], self.found[name], rank)

    def _dense(self, unit: FactorUnit | None = None) -> None:
        names = self.dense if unit is None else unit.members
        factor_units.restore(self.model, {name: self.dense[name] for name in names})

    # --- what came of it --------------------------------------------------------------------------

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of all units, those of ``ranks`` factorised."""
        return sum(size.parameters(ranks.get(name)) for name, size in self.sizes.items())

    def table(self, ranks: Ranks, measured: Mapping[str, float]) -> list[dict[str, Any]]:
        """One row a unit, for the report."""
        rows = []
        with self.context.progress.task("latencies", len(self.units)) as task:
            for name, unit in self.units.items():
                rank, size, found = ranks[name], self.sizes[name], self.found[name]
                row: dict[str, Any] = {
                    "name": name,
                    "shape": [size.outputs, size.inputs],
                    "rank": rank,
                    "break_even": size.break_even,
                    "parameters_before": size.dense,
                    "parameters_after": size.parameters(rank),
                    "error_predicted": 0.0 if rank is None else float(found.errors[rank]),
                    "error_measured": measured.get(name, 0.0),
                    "latency_before_ms": (before := self._milliseconds(unit, None)),
                    "latency_after_ms": before if rank is None else self._milliseconds(unit, rank),
                    "kept_dense": rank is None,
                }
                if len(unit.members) > 1:
                    row["with"] = list(unit.members[1:])
                rows.append(row)
                task.advance()
        return rows

    def _milliseconds(self, unit: FactorUnit, rank: int | None) -> float:
        size = self.sizes[unit.name]
        if unit.table:
            return self.clock.table(size.outputs, rank)
        return self.clock.product(size.outputs, size.inputs, rank)


def _counted(items: list[Any], done: Any) -> Any:
    for item in items:
        yield item
        done()
