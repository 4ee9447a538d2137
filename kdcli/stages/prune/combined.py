"""Vocabulary, layers, width, and what else follows them in one command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcli import families, registry
from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.families.layer import Layer
from kdcli.families.stack import encoder_layers
from kdcli.models.tokens import Vocabulary
from kdcli.report.schema import Method, Warning_
from kdcli.request import Gates, Request
from kdcli.stages.prune import depth, plan, units, vocab
from kdcli.stages.prune.budget import layer_macs, table_row
from kdcli.stages.prune.criterion import Criterion
from kdcli.stages.prune.options import STRUCTURES, PruneOptions, parts_of
from kdcli.training.recovery import recover

FIXED = {"layers": ("keep_layers", "keep"), "width": ("width",)}
"""Settings by which a part says for itself how much stays."""


@dataclass(frozen=True)
class StructurePart:
    """One kind of structure, its method, and how much of it goes."""

    structure: str  # vocab, layers, width, heads, neurons or heads+neurons
    name: str  # of the method
    criterion: Criterion
    config: Any
    settings: Mapping[str, str]  # those that made the config
    sparsity: float | None = None
    budget: float | None = None

    @property
    def fixed(self) -> bool:
        """Whether its settings say how much stays."""
        said = self.config.model_dump()
        return any(said.get(key) is not None for key in FIXED.get(self.structure, ()))


@dataclass(frozen=True)
class CombinedPlan:
    """Parts in the order in which they go."""

    options: PruneOptions
    parts: list[StructurePart]
    params: dict[str, Any]  # for the report
    max_drop: float | None = None  # search the smallest model that keeps it

    def removing(self, share: float) -> CombinedPlan:
        """The same, with another share for the part that one is for."""
        parts = [p if p.sparsity is None else replace(p, sparsity=share) for p in self.parts]
        return replace(self, parts=parts)


@dataclass
class State:
    """What has happened so far."""

    tokens: float  # T, mean length of a training row of the model as it came
    dense: float  # multiply-accumulates of its encoder
    origin: list[int]  # of each layer that is left: its number in that model
    detail: dict[str, Any] = field(default_factory=dict)
    warnings: list[Warning_] = field(default_factory=list)


def is_combined(request: Request) -> bool:
    """Whether this module prunes what is asked for, rather than heads and neurons, or weights, alone."""
    structure = request.options_as(PruneOptions).structure
    return any(part in ("vocab", "layers", "width") for part in structure.split("+"))


def check_model(context: Context) -> None:
    """Refuse a model that has no such parts.

    Raises:
        InputError: It is of an unknown architecture, or its tokenizer of an unknown algorithm.
    """
    structures = parts_of(context.request.options_as(PruneOptions).structure)
    if structures != ("vocab",):
        assert context.checkpoint.family
    if "vocab" in structures:
        Vocabulary(context.checkpoint.tokenizer)


def check(request: Request) -> CombinedPlan:
    """Check the options by themselves, before anything is loaded.

    Raises:
        UsageError: Says which option is wrong and what is allowed.
    """
    options = request.options_as(PruneOptions)
    structures = parts_of(options.structure)
    chosen = _chosen(structures, options.method)
    _, settings = registry.share_out("prune", request.common.settings, dict(chosen.values()))
    parts = [
        StructurePart(structure, name, criterion, criterion.configured(settings[name]), settings[name])
        for structure, (name, criterion) in chosen.items()
    ]
    if options.target_speedup is not None:
        raise UsageError(
            "--target-speedup is met by removing heads and neurons alone",
            "prune the rest first, and the result by kdcli prune - --target-speedup F",
        )
    if options.schedule == "gradual":
        raise UsageError("--schedule gradual removes heads, neurons or weights alone", "leave out --schedule")
    parts = _share_out(options, parts)
    params: dict[str, Any] = {"structure": "+".join(structures)}
    for part in parts:
        if part.sparsity is not None:
            params |= {"sparsity": part.sparsity, "sparsity_of": _OF[part.structure]}
        if part.budget is not None:
            params |= {"budget": part.budget, "budget_of": "multiply-accumulates of the encoder"}
        prefix = f"{part.name}." if len(parts) > 1 else ""
        params |= {prefix + key: value for key, value in part.config.model_dump().items()}
        file = part.config.vocab_text if part.structure == "vocab" else None
        if file is not None and not Path(file).is_file():
            raise UsageError(f"--set vocab_text={file}: there is no such file")
        if part.structure in plan.UNITS:
            if (schedule := plan.schedule_of(options, part.name, part.criterion)) is not None:
                params["schedule"] = schedule
            plan.check(_alone(request, part))
    max_drop = request.common.gates.max_drop
    if options.sparsity is not None or all(part.sparsity is None for part in parts):
        max_drop = None  # how much goes is said: it is a gate and nothing else
    if max_drop is not None:
        params["max_drop"] = max_drop
    return CombinedPlan(options, parts, params | {"epochs": options.epochs}, max_drop)


_OF = {
    "layers": "encoder layers",
    "width": "features of the residual stream",
    **{s: f"multiply-accumulates of the {s} that are there when their turn comes" for s in plan.UNITS},
}


def _chosen(structures: tuple[str, ...], method: str | None) -> dict[str, tuple[str, Criterion]]:
    """Structure -> its method, with its name; ``--method`` goes to the structures it can prune."""
    found = {s: (STRUCTURES[s], registry.load("prune", STRUCTURES[s], Criterion)) for s in structures}
    if method is not None:
        criterion = registry.load("prune", method, Criterion)
        fitting = [s for s in structures if s in criterion.structures]
        if not fitting:
            able = [n for n, one in plan.criteria().items() if set(one.structures) & set(structures)]
            raise UsageError(
                f"--method {method} does not prune {'+'.join(structures)}; use {' or '.join(able)}"
            )
        found |= dict.fromkeys(fitting, (method, criterion))
    return found


def _share_out(options: PruneOptions, parts: list[StructurePart]) -> list[StructurePart]:
    """Say which part ``--sparsity`` or ``--budget`` is for: heads and neurons, or the one part that has MACs."""
    open_parts = [p for p in parts if p.structure != "vocab" and not p.fixed]
    of_units = [p for p in open_parts if p.structure in plan.UNITS]
    target = of_units[0] if of_units else open_parts[0] if len(open_parts) == 1 else None
    given = "--sparsity" if options.sparsity is not None else "--budget"
    asked = options.sparsity is not None or options.budget is not None
    for part in open_parts:
        if part is not target:
            key = FIXED[part.structure][0]
            raise UsageError(
                f"how much of the {part.structure} goes is not said: {given} is for one part of a combination",
                f"add --set {key}=N",
            )
    if target is None and asked:
        fixed = ", ".join(f"--set {FIXED[p.structure][0]}" for p in parts if p.fixed)
        reason = f"{fixed} says it already" if fixed else "tokens cost none of the encoder's products"
        raise UsageError(
            f"{given} has nothing to go to: {reason}", "leave it out, or add heads+neurons to --structure"
        )
    sparsity = None
    if options.budget is None:
        sparsity = plan.SPARSITY if options.sparsity is None else options.sparsity
    return [replace(p, sparsity=sparsity, budget=options.budget) if p is target else p for p in parts]


def _alone(request: Request, part: StructurePart, budget: float | None = None) -> Request:
    """The request for this part by itself, without training and without gates."""
    options = request.options_as(PruneOptions).model_copy(
        update={
            "structure": part.structure,
            "method": part.name,
            "sparsity": part.sparsity,
            "budget": budget if budget is not None else part.budget,
            "epochs": 0,
        }
    )
    return replace(
        request,
        options=options,
        common=request.common.model_copy(update={"settings": part.settings, "gates": Gates()}),
    )


def apply(context: Context, chain: CombinedPlan) -> Applied:
    """Prune part after part, then train what is left for ``--epochs``."""
    layers = _layers(context)
    tokens = float(context.encoded["train"].lengths.mean())
    table = [table_row(layer, tokens, "before") for layer in layers]
    state = State(tokens, sum(layer_macs(x, tokens) for x in layers), list(range(len(layers))))
    for part in chain.parts:
        if part.structure == "vocab":
            vocab.drop(context, part, state)
        elif part.structure in plan.UNITS:
            _cut_units(context, part, state)
        else:
            depth.shrink(context, part, state)
    detail: dict[str, Any] = {"sequence": tokens}
    layers = _layers(context)
    if table:
        left = sum(layer_macs(layer, tokens) for layer in layers)
        detail |= {
            "encoder_macs_before": round(state.dense),
            "encoder_macs_after": round(left),
            "encoder_macs_kept": left / state.dense if state.dense else 1.0,
        }
    detail["parts"] = state.detail
    if chain.options.epochs:
        options = chain.options
        detail["recovery"] = recover(
            context, epochs=options.epochs, lr=options.lr, batch_size=options.batch_size
        )
    after: list[dict[str, Any]] = [{"heads_after": 0, "neurons_after": 0, "macs_after": 0} for _ in table]
    for number, layer in zip(state.origin, layers, strict=True):
        after[number] = table_row(layer, tokens, "after")
    rows = [one | two | {"layer": one["layer"]} for one, two in zip(table, after, strict=True)]
    name = "+".join(dict.fromkeys(part.name for part in chain.parts))
    method = Method(name=name, params=chain.params, detail=detail, layers=rows)
    return Applied(context.checkpoint, method, warnings=state.warnings)


def _cut_units(context: Context, part: StructurePart, state: State) -> None:
    """Heads and neurons spend what is left of a budget that refers to the model as it came."""
    budget = None
    if part.budget is not None:
        left = sum(layer_macs(layer, state.tokens) for layer in _layers(context))
        budget = part.budget * state.dense / left if left else 1.0
        if budget >= 1:
            state.warnings.append(
                Warning_(
                    code="budget-met",
                    message=f"the parts before left {left / state.dense:.1%} of the encoder's "
                    f"multiply-accumulates, so no {part.structure} had to go for --budget {part.budget}",
                )
            )
            state.detail[part.structure] = {"encoder_macs_kept": left / state.dense}
            return
    applied = units.apply(context, plan.check(_alone(context.request, part, budget)))
    state.detail[part.structure] = applied.method.detail
    state.warnings += applied.warnings


def _layers(context: Context) -> list[Layer]:
    """Encoder layers; none of a model that is no transformer, whose tokens can be dropped all the same."""
    checkpoint = context.checkpoint
    known = families.is_encoder(checkpoint.model_type)
    return encoder_layers(checkpoint.model, checkpoint.family) if known else []
