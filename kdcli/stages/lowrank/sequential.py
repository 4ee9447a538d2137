"""Replacing the matrices of an encoder one after the other, each behind those that are replaced already.

Letters: B rows, T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families.family import Encoder
from kdcli.inputs import kinds
from kdcli.probe.hooks import Enough, reading, watching
from kdcli.probe.layer_calls import LayerCall, calls_of
from kdcli.probe.moments import Moments
from kdcli.stages.lowrank import factors
from kdcli.stages.lowrank.factor_units import FactorUnit, install
from kdcli.stages.lowrank.factors import Factors, Problem, narrow_by_outputs


@dataclass(frozen=True)
class Sample:
    """A batch of calibration rows: what the model is called with, and how much each token counts for a layer.

    ``weights``: layer -> (B, T), 0 or more; a layer that is not there counts every real token alike.
    """

    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, unit: FactorUnit) -> tuple[Tensor, Tensor | None]:
        """Which tokens count for a unit, (B, T) bool, and how much each of them does."""
        real = kinds.mask(self.inputs).bool()
        parts = [self.weights[m] for m in unit.members if m in self.weights]
        if not parts:
            return real, None
        weights = torch.stack(parts).sum(0) * real
        counted = weights > 0
        return counted, weights[counted]


def _inner(unit: FactorUnit, x: Tensor) -> Tensor:
    """The narrow side's features u = Q x, (B, T, m); x itself where the inputs are the narrow side."""
    assert isinstance(unit.dense, nn.Linear)
    return nn.functional.linear(x, unit.dense.weight) if narrow_by_outputs(unit.dense) else x


@torch.no_grad()
def table_moments(table: nn.Embedding, counts: Tensor) -> Moments:
    """Moments of the table's rows (D,), each as often as its token occurs and once more.

    The one more keeps tokens in mind that the training rows do not have.

    Args:
        table: (V, D).
        counts: (V,) occurrences of every token.
    """
    made = Moments(table.embedding_dim, table.weight.device)
    weights = (counts.to(made.mean.device) + 1).float()
    for part, share in zip(table.weight.detach().split(8192), weights.split(8192), strict=True):
        made.add(part, weights=share)
    return made


@torch.no_grad()
def collect(
    model: nn.Module,
    family: Encoder,
    units: Mapping[str, FactorUnit],
    samples: Sequence[Sample],
    *,
    magnitudes: bool = False,
    done: Callable[[], None] = lambda: None,
) -> Iterator[tuple[dict[str, Moments], dict[str, Tensor]]]:
    """Run the model, one encoder layer after the other, and give the statistics of each layer's linear units.

    Units that read the very same tensor (query, key and value) share one :class:`Moments`. A layer with fewer
    outputs than inputs is described by its outputs without bias, any other by its inputs. Between two layers only
    hidden states are held, so what was given can be used and forgotten.

    Args:
        model: Dense, in eval mode; what is done to a layer that was given does not matter any more.
        family: Of the model.
        units: By name; tables are left out, their statistics are the tokens' own.
        samples: Calibration rows; padding does not count.
        magnitudes: Whether the mean of |x| (I,) over the tokens is wanted.
        done: Called after every layer.

    Yields:
        Name -> moments, and name -> mean of |x|.
    """
    layers: Any = model.get_submodule(family.layers)
    calls, states = calls_of(model, layers[0], [sample.inputs for sample in samples])
    for index, layer in enumerate(layers):
        prefix = f"{family.layers}.{index}."
        watched = {u.members[0].removeprefix(prefix): u for n, u in units.items() if n.startswith(prefix)}
        moments: dict[str, Moments] = {}
        sizes: dict[str, Tensor] = {}
        for at, (call, sample) in enumerate(zip(calls, samples, strict=True)):
            states[at], inputs, _ = _watched(layer, watched, call, states[at])
            shared: dict[int, Moments] = {}
            for path, x in inputs.items():
                unit = watched[path]
                counted, weights = sample.of(unit)
                # A product of its own, or a tensor that others read too and have added already.
                mine = narrow_by_outputs(unit.dense) or weights is not None
                if mine or id(x) not in shared:
                    values = _inner(unit, x)
                    own = moments.get(unit.name) or Moments(values.shape[-1], values.device)
                    own.add(values[counted], weights=weights)
                else:
                    own = shared[id(x)]
                moments[unit.name] = own
                if not mine:
                    shared[id(x)] = own
                if magnitudes:
                    size = x[counted].abs().sum(0).double()
                    sizes[unit.name] = sizes[unit.name] + size if unit.name in sizes else size
        yield moments, {name: size / (moments[name].weight or 1.0) for name, size in sizes.items()}
        done()


def _reaching(
    layer: nn.Module, call: LayerCall, hidden: Tensor, path: str, also: str | None
) -> dict[str, Tensor]:
    """Run ``layer`` until its part ``path`` is reached; the inputs of it and of ``also``."""
    found: dict[str, Tensor] = {}

    def see(key: str, given: Tensor) -> None:
        found[key] = given
        if key == path:
            raise Enough

    parts = {key: layer.get_submodule(key) for key in (path, also) if key is not None}
    with reading(parts, see), suppress(Enough):
        call(layer, hidden)
    return found


def _watched(
    layer: nn.Module, paths: Iterable[str], call: LayerCall, hidden: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run ``layer``; its output, and inputs and outputs of its parts ``paths``."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x, y

    with watching({path: layer.get_submodule(path) for path in paths}, see):
        return call(layer, hidden), inputs, outputs


@dataclass(frozen=True)
class Fit:
    """How units are fitted behind others: ``targets``, ``inputs`` or ``off``, and with which ridge."""

    mode: str
    ridge: float


@dataclass(frozen=True)
class Replacement:
    """Which units of a model are replaced, and how.

    With ``targets`` a unit's factors are solved again for the inputs that it now gets, against what the dense
    layer gives on the dense model's inputs; the projections that end in the residual stream also make up
    for what the stream has lost so far. With ``inputs`` only the inputs are new. With ``off`` ``found`` is used.

    Attributes:
        units: All by name.
        ranks: Name -> rank of those to replace.
        found: Factors from the dense model's own inputs.
        problem: Makes the problem of a unit from moments (with what else is known about it).
        solve: Solves a problem up to a rank.
        fit: The mode.
        spend: Whether the memory of dense layers is given up once they are replaced; the units are of no use then.
    """

    units: Mapping[str, FactorUnit]
    ranks: Mapping[str, int]
    found: Mapping[str, Factors]
    problem: Callable[[FactorUnit, Moments], Problem]
    solve: Callable[[Problem, int], Factors]
    fit: Fit
    spend: bool = False

    def of_layer(self, prefix: str) -> dict[str, FactorUnit]:
        """Path inside an encoder layer -> the unit that it belongs to, of those to replace."""
        members = {member: self.units[name] for name in self.ranks for member in self.units[name].members}
        return {m.removeprefix(prefix): unit for m, unit in members.items() if m.startswith(prefix)}


@torch.no_grad()
def replace_all(
    model: nn.Module,
    family: Encoder,
    job: Replacement,
    samples: Sequence[Sample],
    *,
    done: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Install every unit of ``job.ranks`` in the order in which the model runs them.

    Args:
        model: Dense; changed in place.
        family: Of the model.
        job: What to replace.
        samples: Calibration rows.
        done: Called once an encoder layer.

    Returns:
        Name -> E |y' - y|^2 / E |y - mean y|^2 over the tokens that count: y what the unit gives in the dense model,
        y' what it gives in the model where everything of ``job.ranks`` is replaced.
    """
    layers: Any = model.get_submodule(family.layers)
    inputs = [sample.inputs for sample in samples]
    calls, exact = calls_of(model, layers[0], inputs)
    errors: dict[str, float] = {}
    for name in [name for name in job.ranks if job.units[name].table]:
        install(model, job.units[name], job.found[name], job.ranks[name])
        errors[name] = float(job.found[name].errors[job.ranks[name]])
    given = calls_of(model, layers[0], inputs)[1] if errors else exact
    for index, layer in enumerate(layers):
        prefix = f"{family.layers}.{index}."
        if own := job.of_layer(prefix):
            if given is exact:
                given = list(exact)
            part = _ReplacedLayer(job, family, layer, prefix, own, calls, samples, exact, given)
            part.replace(model)
            errors |= part.advance()
            exact = part.after
            del part  # what it has kept of the dense layer is as much as the hidden states, several times
            if job.spend:
                for unit in own.values():
                    unit.dense.to("meta")
        else:
            changed = given is not exact
            for at, call in enumerate(calls):
                if changed:
                    given[at] = call(layer, given[at])
                exact[at] = call(layer, exact[at])
        done()
    return errors


class _ReplacedLayer:
    """One encoder layer that is replaced, with the hidden states in front of it.

    The dense layer runs once; what says how its parts answer is kept until the layer is done.

    Args:
        job: What to replace.
        family: Of the model.
        layer: Dense yet.
        prefix: Of its parts' names in the model.
        own: Path inside the layer -> unit to replace.
        calls: How every batch calls a layer.
        samples: The batches.
        exact: What the layer is given in the dense model (B, T, D), batch by batch.
        given: What it is given now; :meth:`advance` puts there what it gives.
    """

    def __init__(
        self,
        job: Replacement,
        family: Encoder,
        layer: nn.Module,
        prefix: str,
        own: Mapping[str, FactorUnit],
        calls: Sequence[LayerCall],
        samples: Sequence[Sample],
        exact: Sequence[Tensor],
        given: list[Tensor],
    ) -> None:
        self.job, self.family, self.layer, self.prefix, self.own = job, family, layer, prefix, own
        self.calls, self.samples, self.exact, self.given = calls, samples, exact, given
        self.kept: list[dict[str, Tensor]] = []  # the narrower side of every unit of the dense layer
        self.middle: list[Tensor] = []  # what the first product behind the attention gets in the dense model
        self.after: list[Tensor] = []  # what the dense layer gives
        for call, right in zip(calls, exact, strict=True):
            output, inputs, outputs = _watched(layer, {*own, family.ffn_in}, call, right)
            self.after.append(output)
            self.middle.append(inputs[family.ffn_in])
            narrow = {p: (outputs if narrow_by_outputs(u.dense) else inputs)[p] for p, u in own.items()}
            self.kept.append(narrow)
            del inputs, outputs

    def replace(self, model: nn.Module) -> None:
        """Install the layer's units, group by group."""
        job = self.job
        for group in _groups(self.family):
            todo = list({self.own[path].name: self.own[path] for path in group if path in self.own}.values())
            new = {unit.name: job.found[unit.name] for unit in todo}
            if todo and job.fit.mode != "off":
                moments = self._moments(group, todo)
                for unit in todo:
                    here = job.problem(unit, moments[unit.name])
                    if job.fit.mode == "targets":
                        here = factors.refit(here, moments[unit.name], ridge=job.fit.ridge)
                    new[unit.name] = job.solve(here, job.ranks[unit.name])
            for unit in todo:
                install(model, unit, new[unit.name], job.ranks[unit.name])

    def advance(self) -> dict[str, float]:
        """Take the states of now past the replaced layer; the error that every unit leaves, see :func:`replace_all`."""
        sums = {unit.name: torch.zeros(2, dtype=torch.float64) for unit in self.own.values()}
        for at, call in enumerate(self.calls):
            self.given[at], _, outputs = _watched(self.layer, self.own, call, self.given[at])
            for name, total in sums.items():
                unit, found = self.job.units[name], self.job.found[name]
                total += _difference(unit, self.prefix, found, self.kept[at], outputs, self.samples[at])
        return {name: float(wrong / spread) if spread else 0.0 for name, (wrong, spread) in sums.items()}

    def _moments(self, group: tuple[str, ...], todo: Sequence[FactorUnit]) -> dict[str, Moments]:
        """Moments of the units of one group, which all read the same tensor, on the inputs they get now."""
        first = todo[0].members[0].removeprefix(self.prefix)
        # What the residual stream carries past the group has an error already; its projection can take it back.
        past = self.family.ffn_in if group == (self.family.ffn_out,) else None
        moments: dict[str, Moments] = {}
        for at, (sample, call) in enumerate(zip(self.samples, self.calls, strict=True)):
            new = _reaching(self.layer, call, self.given[at], first, past)
            for unit in todo:
                u = _inner(unit, new[first])
                counted, weights = sample.of(unit)
                targets = None
                if self.job.fit.mode == "targets":
                    targets = _answer(unit, self.kept[at][first], counted)
                    if group == (self.family.attention_output,):
                        targets = targets + (self.exact[at] - self.given[at])[counted]
                    elif past is not None:
                        targets = targets + (self.middle[at] - new[past])[counted]
                if unit.name not in moments:
                    size = 0 if targets is None else targets.shape[1]
                    moments[unit.name] = Moments(u.shape[-1], u.device, size)
                moments[unit.name].add(u[counted], targets, weights)
        return moments


def _difference(
    unit: FactorUnit,
    prefix: str,
    found: Factors,
    kept: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    sample: Sample,
) -> Tensor:
    """(2,) float64: squared distance of a unit's outputs from the dense ones, and of those from their mean."""
    paths = [member.removeprefix(prefix) for member in unit.members]
    counted, weights = sample.of(unit)
    y = _answer(unit, kept[paths[0]], counted)
    now = torch.cat([outputs[path][counted] for path in paths], dim=1)
    both = torch.stack([(now - y).square().sum(1), (y - found.output.to(y)).square().sum(1)]).double()
    return (both if weights is None else both * weights).sum(1).cpu()


def _answer(unit: FactorUnit, kept: Tensor, counted: Tensor) -> Tensor:
    """What a dense unit answers (N, O), from the narrower side of it (B, T, m) on the tokens that count (B, T)."""
    assert isinstance(unit.dense, nn.Linear)
    if narrow_by_outputs(unit.dense):
        return kept[counted]
    return nn.functional.linear(kept[counted], unit.dense.weight, unit.dense.bias)


def _groups(family: Encoder) -> list[tuple[str, ...]]:
    return [
        (family.query, family.key, family.value),
        (family.attention_output,),
        (family.ffn_in,),
        (family.ffn_out,),
    ]
