"""Replacing the matrices of an encoder one after the other, each behind those that are replaced already.

A :class:`Unit` is what is factorised as one: a linear layer, the query, key and value layers of one attention
when they share a right factor, or an embedding table. Letters: B rows, T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.methods import factors
from kdcli.methods.factors import Factors, Problem, narrow_by_outputs
from kdcli.methods.moments import Moments, watching
from kdcli.models import transforms
from kdcli.models.families import Family
from kdcli.models.layers import LowRankLinear

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """What is factorised as one: its name, the names of its layers, and the dense layer (stacked by outputs)."""

    name: str
    members: tuple[str, ...]
    dense: nn.Linear | nn.Embedding

    @property
    def table(self) -> bool:
        """Whether it is an embedding table."""
        return isinstance(self.dense, nn.Embedding)


@torch.no_grad()
def unit_of(model: nn.Module, members: Sequence[str]) -> Unit:
    """Make a unit of one layer, or of several with the same inputs and with biases."""
    layers = [model.get_submodule(name) for name in members]
    if len(layers) == 1:
        assert isinstance(layers[0], nn.Linear | nn.Embedding)
        return Unit(members[0], tuple(members), layers[0])
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    stacked = nn.Linear(linears[0].in_features, sum(x.out_features for x in linears), device="meta")
    stacked.weight = nn.Parameter(torch.cat([x.weight for x in linears]))
    stacked.bias = nn.Parameter(torch.cat([x.bias for x in linears]))
    return Unit(members[0], tuple(members), stacked)


@torch.no_grad()
def install(model: nn.Module, unit: Unit, found: Factors, rank: int) -> None:
    """Put the factors of ``rank`` in the place of the unit's layers."""
    if unit.table:
        table = transforms.factorise_table(model, unit.name, rank)
        left, right = found.left[:, :rank], found.right[:rank]
        table.token_embeddings.weight.copy_(right.T)
        table.second.weight.copy_(left)
        table.second.bias.copy_(found.centre - left.double() @ found.mean[:rank])
        return
    pairs = transforms.factorise_linears(model, unit.members, rank)
    assert isinstance(unit.dense, nn.Linear)
    inputs, outputs = unit.dense.in_features, unit.dense.out_features
    whole = LowRankLinear(inputs, outputs, rank, bias=unit.dense.bias is not None)
    whole.to(unit.dense.weight.device)
    factors.fill(whole, found, rank)
    pairs[0].first.weight.copy_(whole.first.weight)
    at = 0
    for pair in pairs:
        pair.second.weight.copy_(whole.second.weight[at : at + pair.out_features])
        if pair.second.bias is not None:
            pair.second.bias.copy_(whole.second.bias[at : at + pair.out_features])
        at += pair.out_features


def restore(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Put modules back under their names."""
    for name, module in dense.items():
        model.set_submodule(name, module)


@dataclass(frozen=True)
class Sample:
    """A batch of calibration rows: what the model is called with, and how much each token counts for a layer.

    ``weights``: layer -> (B, T), 0 or more; a layer that is not there counts every real token alike.
    """

    inputs: Batch
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, unit: Unit) -> tuple[Tensor, Tensor | None]:
        """Which tokens count for a unit, (B, T) bool, and how much each of them does."""
        real = self.inputs["attention_mask"].bool()
        parts = [self.weights[m] for m in unit.members if m in self.weights]
        if not parts:
            return real, None
        weights = torch.stack(parts).sum(0) * real
        counted = weights > 0
        return counted, weights[counted]


@torch.no_grad()
def collect(
    model: nn.Module,
    units: Mapping[str, Unit],
    samples: Sequence[Sample],
    moments: dict[str, Moments],
    *,
    magnitudes: dict[str, Tensor] | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Run the model and add the statistics of every linear unit to ``moments``.

    Units that read the very same tensor (query, key and value) share one :class:`Moments`. A layer with fewer
    outputs than inputs is described by its outputs without bias, any other by its inputs.

    Args:
        model: Dense, in eval mode.
        units: By name; tables are left out, their statistics are the tokens' own.
        samples: Calibration rows; tokens whose ``attention_mask`` (B, T) is 0 do not count.
        moments: Extended in place; start with an empty one.
        magnitudes: Filled with the sum of |x| (I,) over the tokens of ``moments``, where given.
        done: Called after every batch.
    """
    watched = {u.members[0]: u for u in units.values() if not u.table}
    for sample in samples:
        # The tensors are kept until the batch is over, so that no identity is used twice.
        added: dict[int, tuple[Tensor, Moments]] = {}

        def see(name: str, x: Tensor, y: Tensor, sample: Sample = sample, added: dict = added) -> None:
            unit = watched[name]
            counted, weights = sample.of(unit)
            values = _inner(unit, x)
            if id(values) not in added or weights is not None:
                own = moments.get(unit.name) or Moments(values.shape[-1], values.device)
                own.add(values[counted], weights=weights)
                added[id(values)] = (values, own)
            moments[unit.name] = added[id(values)][1]
            if magnitudes is not None:
                size = x[counted].abs().sum(0).double()
                magnitudes[unit.name] = magnitudes[unit.name] + size if unit.name in magnitudes else size

        with watching({name: model.get_submodule(name) for name in watched}, see):
            model(**sample.inputs)
        done()


def _inner(unit: Unit, x: Tensor) -> Tensor:
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


def _calls(model: nn.Module, family: Family, samples: Sequence[Sample]) -> tuple[list[_Call], list[Tensor]]:
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


def _reaching(
    layer: nn.Module, name: str, call: _Call, hidden: Tensor, also: str | None
) -> dict[str, Tensor]:
    """Run ``layer`` until its linear layer ``name`` is reached; the input of it and of ``also``."""
    found: dict[str, Tensor] = {}

    def note(key: str, stop: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[key] = args[0]
            if stop:
                raise _Stop

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(note(name, True))]
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run ``layer``; its output, and those of the layers inside it that ``paths`` name."""
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = y

    with watching({path: layer.get_submodule(path) for path in paths}, see):
        return call(layer, hidden), found


@dataclass(frozen=True)
class Fit:
    """How units are fitted behind others: ``targets``, ``inputs`` or ``off``, and with which ridge."""

    mode: str
    ridge: float


@torch.no_grad()
def replace_all(
    model: nn.Module,
    family: Family,
    units: Mapping[str, Unit],
    ranks: Mapping[str, int],
    found: Mapping[str, Factors],
    problem: Callable[[Unit, Moments], Problem],
    solve: Callable[[Problem, int], Factors],
    samples: Sequence[Sample],
    fit: Fit,
    *,
    copy: Callable[[nn.Module], nn.Module],
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
        copy: Makes a copy of an encoder layer.
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
        dense = copy(layer) if own else layer
        for group in _groups(family):
            todo = list({own[path].name: own[path] for path in group if path in own}.values())
            new = {unit.name: found[unit.name] for unit in todo}
            if todo and fit.mode != "off":
                new = _fitted(
                    layer,
                    dense,
                    family,
                    group,
                    todo,
                    prefix,
                    calls,
                    exact,
                    given,
                    samples,
                    fit,
                    problem,
                    solve,
                    ranks,
                )
            for unit in todo:
                install(model, unit, new[unit.name], ranks[unit.name])
        sums = {path: torch.zeros(2, dtype=torch.float64) for path in own}
        means = {path: found[unit.name] for path, unit in own.items()}
        if own and given is exact:
            given = list(exact)
        for at, call in enumerate(calls):  # in place: hidden states are the larger part of the memory
            exact[at], outputs = _watched(dense, own, call, exact[at])
            if given is exact:
                continue
            given[at], changed = _watched(layer, own, call, given[at])
            for path, unit in own.items():
                counted, weights = samples[at].of(unit)
                y, z = outputs[path][counted], changed[path][counted]
                mean = _mean_output(unit, means[path], prefix + path)
                both = torch.stack([(z - y).square().sum(1), (y - mean).square().sum(1)])
                sums[path] += (both if weights is None else both * weights).sum(1).cpu()
        for name in {u.name for u in own.values()}:
            whole = torch.stack([sums[path] for path, unit in own.items() if unit.name == name])
            wrong, spread = whole.sum(0)
            errors[name] = float(wrong / spread) if spread else 0.0
        done()
    return errors


def _groups(family: Family) -> list[tuple[str, ...]]:
    return [
        (family.query, family.key, family.value),
        (family.attention_output,),
        (family.ffn_in,),
        (family.ffn_out,),
    ]


def _mean_output(unit: Unit, found: Factors, member: str) -> Tensor:
    """Mean output (O,) of one layer of a unit in the dense model; without a bias the origin."""
    share = len(found.output) // len(unit.members)
    at = unit.members.index(member)
    return found.output[at * share : (at + 1) * share].to(unit.dense.weight)


def _fitted(
    layer: nn.Module,
    dense: nn.Module,
    family: Family,
    group: tuple[str, ...],
    todo: Sequence[Unit],
    prefix: str,
    calls: Sequence[_Call],
    exact: Sequence[Tensor],
    given: Sequence[Tensor],
    samples: Sequence[Sample],
    fit: Fit,
    problem: Callable[[Unit, Moments], Problem],
    solve: Callable[[Problem, int], Factors],
    ranks: Mapping[str, int],
) -> dict[str, Factors]:
    """Factors of the units of one group, which all read the same tensor, on the inputs they get now."""
    first = todo[0].members[0].removeprefix(prefix)
    # What the residual stream carries past the group has an error already; its projection can take it back.
    past = family.ffn_in if group == (family.ffn_out,) else None
    targets = fit.mode == "targets"
    moments: dict[str, Moments] = {}
    for sample, call, right, ours in zip(samples, calls, exact, given, strict=True):
        new = _reaching(layer, first, call, ours, past)
        old = _reaching(dense, first, call, right, past) if targets else new
        for unit in todo:
            assert isinstance(unit.dense, nn.Linear)
            u = _inner(unit, new[first])
            counted, weights = sample.of(unit)
            if unit.name not in moments:
                size = unit.dense.out_features if targets else 0
                moments[unit.name] = Moments(u.shape[-1], u.device, size)
            y = None
            if targets:
                y = nn.functional.linear(old[first][counted], unit.dense.weight, unit.dense.bias)
                if group == (family.attention_output,):
                    y = y + (right - ours)[counted]
                elif past is not None:
                    y = y + (old[past] - new[past])[counted]
            moments[unit.name].add(u[counted], y, weights)
    made = {}
    for unit in todo:
        own = problem(unit, moments[unit.name])
        if targets:
            own = factors.refit(own, moments[unit.name], ridge=fit.ridge)
        made[unit.name] = solve(own, ranks[unit.name])
    return made
