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
from kdcli.probe.moments import Moments, watching
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


class _Stop(Exception):
    """The rest of the layer is not needed."""


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass
class _Call:
    """How one batch calls an encoder layer: the hidden state comes first, the rest is the same for all layers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return _first(layer(hidden, *self.args, **self.kwargs))


def _calls(model: nn.Module, family: Encoder, samples: Sequence[Sample]) -> tuple[list[_Call], list[Tensor]]:
    """How the first encoder layer is called, and its hidden state (B, T, D), batch by batch."""
    layers: Any = model.get_submodule(family.layers)
    made: list[_Call] = []
    states: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        made.append(_Call(args[1:], kwargs))
        states.append(hidden)
        raise _Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for sample in samples:
            with suppress(_Stop):
                model(**sample.inputs)
    finally:
        handle.remove()
    return made, states


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
    calls, states = _calls(model, family, samples)
    layers: Any = model.get_submodule(family.layers)
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
    layer: nn.Module, call: _Call, hidden: Tensor, path: str, also: str | None
) -> dict[str, Tensor]:
    """Run ``layer`` until its part ``path`` is reached; the inputs of it and of ``also``."""
    found: dict[str, Tensor] = {}

    def note(key: str, stop: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[key] = args[0]
            if stop:
                raise _Stop

        return hook

    handles = [layer.get_submodule(path).register_forward_pre_hook(note(path, True))]
    if also is not None:
        handles.append(layer.get_submodule(also).register_forward_pre_hook(note(also, False)))
    try:
        with suppress(_Stop):
            call(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watched(
    layer: nn.Module, paths: Iterable[str], call: _Call, hidden: Tensor
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


@torch.no_grad()
def replace_all(
    model: nn.Module,
    family: Encoder,
    units: Mapping[str, FactorUnit],
    ranks: Mapping[str, int],
    found: Mapping[str, Factors],
    problem: Callable[[FactorUnit, Moments], Problem],
    solve: Callable[[Problem, int], Factors],
    samples: Sequence[Sample],
    fit: Fit,
    *,
    spend: bool = False,
    done: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Install every unit of ``ranks`` in the order in which the model runs them.

    With ``targets`` a unit's factors are solved again for the inputs that it now gets, against what the dense
    layer gives on the dense model's inputs; the projections that end in the residual stream also make up
    for what the stream has lost so far. With ``inputs`` only the inputs are new. With ``off`` ``found`` is used.

    Args:
        model: Dense; changed in place.
        family: Of the model.
        units: All by name.
        ranks: Name -> rank of those to replace.
        found: Factors from the dense model's own inputs.
        problem: Makes the problem of a unit from moments (with what else is known about it).
        solve: Solves a problem up to a rank.
        samples: Calibration rows.
        fit: The mode.
        spend: Whether the memory of dense layers is given up once they are replaced; the units are of no use then.
        done: Called once an encoder layer.

    Returns:
        Name -> E |y' - y|^2 / E |y - mean y|^2 over the tokens that count: y what the unit gives in the dense model,
        y' what it gives in the model where everything of ``ranks`` is replaced.
    """
    wanted = {member: units[name] for name in ranks for member in units[name].members}
    calls, exact = _calls(model, family, samples)
    errors: dict[str, float] = {}
    for name in [name for name in ranks if units[name].table]:
        install(model, units[name], found[name], ranks[name])
        errors[name] = float(found[name].errors[ranks[name]])
    given = _calls(model, family, samples)[1] if errors else exact
    modules: Any = model.get_submodule(family.layers)
    for index, layer in enumerate(modules):
        prefix = f"{family.layers}.{index}."
        own = {m.removeprefix(prefix): u for m, u in wanted.items() if m.startswith(prefix)}
        if not own:
            changed = given is not exact
            for at, call in enumerate(calls):
                if changed:
                    given[at] = call(layer, given[at])
                exact[at] = call(layer, exact[at])
            done()
            continue
        if given is exact:
            given = list(exact)
        # The dense layer runs once; what says how its parts answer is kept until the layer is done.
        kept: list[dict[str, Tensor]] = []
        middle: list[Tensor] = []
        after: list[Tensor] = []
        for call, right in zip(calls, exact, strict=True):
            output, inputs, outputs = _watched(layer, {*own, family.ffn_in}, call, right)
            after.append(output)
            middle.append(inputs[family.ffn_in])
            kept.append({p: (outputs if narrow_by_outputs(u.dense) else inputs)[p] for p, u in own.items()})
            del inputs, outputs
        for group in _groups(family):
            todo = list({own[path].name: own[path] for path in group if path in own}.values())
            new = {unit.name: found[unit.name] for unit in todo}
            if todo and fit.mode != "off":
                moments = _moments(
                    layer, family, group, todo, prefix, calls, exact, given, kept, middle, samples, fit
                )
                for unit in todo:
                    here = problem(unit, moments[unit.name])
                    if fit.mode == "targets":
                        here = factors.refit(here, moments[unit.name], ridge=fit.ridge)
                    new[unit.name] = solve(here, ranks[unit.name])
            for unit in todo:
                install(model, unit, new[unit.name], ranks[unit.name])
        sums = {unit.name: torch.zeros(2, dtype=torch.float64) for unit in own.values()}
        for at, call in enumerate(calls):
            given[at], _, outputs = _watched(layer, own, call, given[at])
            for name in sums:
                sums[name] += _difference(units[name], prefix, found[name], kept[at], outputs, samples[at])
        exact = after
        errors |= {n: float(wrong / spread) if spread else 0.0 for n, (wrong, spread) in sums.items()}
        if spend:
            for unit in own.values():
                unit.dense.to("meta")
        done()
    return errors


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


def _moments(
    layer: nn.Module,
    family: Encoder,
    group: tuple[str, ...],
    todo: Sequence[FactorUnit],
    prefix: str,
    calls: Sequence[_Call],
    exact: Sequence[Tensor],
    given: Sequence[Tensor],
    kept: Sequence[Mapping[str, Tensor]],
    middle: Sequence[Tensor],
    samples: Sequence[Sample],
    fit: Fit,
) -> dict[str, Moments]:
    """Moments of the units of one group, which all read the same tensor, on the inputs they get now.

    ``exact`` and ``given`` are the inputs of the layer in the dense model and now, ``kept`` the narrower side of
    the dense units, ``middle`` what the first product behind the attention gets in the dense model.
    """
    first = todo[0].members[0].removeprefix(prefix)
    # What the residual stream carries past the group has an error already; its projection can take it back.
    past = family.ffn_in if group == (family.ffn_out,) else None
    moments: dict[str, Moments] = {}
    together = zip(samples, calls, exact, given, kept, middle, strict=True)
    for sample, call, right, ours, old, between in together:
        new = _reaching(layer, call, ours, first, past)
        for unit in todo:
            u = _inner(unit, new[first])
            counted, weights = sample.of(unit)
            targets = None
            if fit.mode == "targets":
                targets = _answer(unit, old[first], counted)
                if group == (family.attention_output,):
                    targets = targets + (right - ours)[counted]
                elif past is not None:
                    targets = targets + (between - new[past])[counted]
            if unit.name not in moments:
                size = 0 if targets is None else targets.shape[1]
                moments[unit.name] = Moments(u.shape[-1], u.device, size)
            moments[unit.name].add(u[counted], targets, weights)
    return moments
