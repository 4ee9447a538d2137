"""The options of one pruning, checked and typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kdcli import processes, registry
from kdcli.errors import UsageError, did_you_mean
from kdcli.request import Request
from kdcli.stages.prune.criterion import Criterion, Pattern
from kdcli.stages.prune.options import STRUCTURE_NAMES, STRUCTURES, PruneOptions, n_of_m

SPARSITY = 0.3
"""Used when nothing says how much: no share, no speed-up and no drop that may not be passed."""

TRIES = 6
"""Of the search for the smallest model that keeps ``--max-drop``."""

UNITS = ("heads", "neurons", "heads+neurons")
ZEROS = ("weights", "n:m")


@dataclass
class PrunePlan:
    """What to prune, by which method and how much."""

    options: PruneOptions
    name: str  # of the method
    criterion: Criterion
    config: Any
    sparsity: float | None  # None: options.budget, options.target_speedup or max_drop counts
    params: dict[str, Any]  # for the report
    training: dict[str, Any] = field(default_factory=dict)  # of the recovery
    max_drop: float | None = None  # search the smallest model that keeps it
    memo: dict[str, Any] = field(default_factory=dict)  # of UnitJob, for all cuts of one run
    n_of_m: Pattern | None = None  # structure n:m: counts instead of a sparsity

    @property
    def zeros(self) -> bool:
        """Whether the structure only becomes zero."""
        return self.n_of_m is not None or self.options.structure in ZEROS


def check(request: Request) -> PrunePlan:
    """Check the options by themselves, before anything is loaded.

    Raises:
        UsageError: Says which option is wrong and what is allowed.
    """
    options = request.options_as(PruneOptions)
    pattern = _n_of_m(options)
    structure = "n:m" if pattern else options.structure
    if structure not in STRUCTURES or options.structure == "n:m":
        raise UsageError(
            f"unknown structure '{options.structure}': {did_you_mean(options.structure, STRUCTURE_NAMES)}"
        )
    name = options.method or STRUCTURES[structure]
    criterion = registry.load("prune", name, Criterion)
    if structure not in criterion.structures:
        able = [n for n, one in criteria().items() if structure in one.structures]
        raise UsageError(f"--method {name} does not prune {options.structure}; use {' or '.join(able)}")
    if criterion.trained and options.epochs < 1:
        raise UsageError(
            f"--method {name} learns in training what to remove",
            "give --epochs 1 or more, or choose another method",
        )
    if options.budget is not None and structure in ZEROS:
        raise UsageError(
            "--budget is a share of multiply-accumulates, and zeroing weights removes none of them",
            "give --sparsity, or choose --structure heads+neurons",
        )
    if (target := options.target_speedup) is not None:
        if structure not in UNITS:
            raise UsageError(
                f"--target-speedup is met by removing heads and neurons, not {structure}",
                f"choose --structure {' or '.join(UNITS)}",
            )
        if processes.count() > 1:
            raise UsageError(
                "--target-speedup measures latencies, which several processes would disturb",
                "run it in one process, or give --budget",
            )
    schedule = schedule_of(options, name, criterion)
    _, settings = registry.share_out("prune", request.common.settings, {name: criterion})
    config = criterion.configured(settings[name])
    params: dict[str, Any] = {"structure": options.structure}
    sparsity, max_drop = None, None
    if schedule == "gradual":
        _check_gradual(options, criterion)
    if target is not None:
        params |= {"target_speedup": target}
    elif pattern is not None:
        params |= {"zeros_of": "encoder weights"}
    elif options.budget is not None:
        params |= {"budget": options.budget, "budget_of": "multiply-accumulates of the encoder"}
    elif options.sparsity is None and request.common.gates.max_drop is not None:
        max_drop = request.common.gates.max_drop
        params |= {"max_drop": max_drop}
    else:
        sparsity = SPARSITY if options.sparsity is None else options.sparsity
        of = "encoder weights" if structure in ZEROS else f"multiply-accumulates of the {structure}"
        params |= {"sparsity": sparsity, "sparsity_of": of}
    if schedule is not None:
        params["schedule"] = schedule
    params |= config.model_dump() | {"epochs": options.epochs}
    training = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    return PrunePlan(options, name, criterion, config, sparsity, params, training, max_drop, n_of_m=pattern)


def schedule_of(options: PruneOptions, name: str, criterion: Criterion) -> str | None:
    """The schedule of a method; None for one that judges the model once.

    Raises:
        UsageError: The schedule is unknown, or the method does not have it.
    """
    given, able = options.schedule, criterion.scores_again
    if given in (None, "gradual"):
        return given or ("iterative" if able else None)
    if not able:
        others = [n for n, one in criteria().items() if one.scores_again]
        raise UsageError(
            f"--schedule {given} says how often a method scores the model again, and {name} judges it once",
            f"leave out --schedule, or choose --method {' or '.join(others)}",
        )
    return given


def criteria() -> dict[str, Criterion]:
    """Every method of pruning, by name."""
    return {name: registry.load("prune", name, Criterion) for name in registry.names("prune")}


def _n_of_m(options: PruneOptions) -> Pattern | None:
    """The pattern of a structure like 2:4."""
    if (numbers := n_of_m(options.structure)) is None:
        return None
    n, m = numbers
    if not 0 < n < m:
        raise UsageError(
            f"--structure {options.structure}: of every M neighbours N stay, with N at least 1 and less than M",
            "2:4 keeps two of four",
        )
    if options.sparsity is not None:
        raise UsageError(
            f"--structure {options.structure} says by itself how much becomes zero, {m - n} of {m}, so "
            f"--sparsity {options.sparsity} has no place",
            "leave out --sparsity, or choose --structure weights",
        )
    return Pattern(1 - n / m, n, m)


def _check_gradual(options: PruneOptions, criterion: Criterion) -> None:
    if options.structure not in (*UNITS, "weights"):
        raise UsageError(
            f"--schedule gradual removes heads, neurons or weights little by little, not {options.structure}",
            "leave out --schedule",
        )
    if criterion.trained:
        raise UsageError(
            "--schedule gradual judges the model again at every cut; a method that learns what to remove has "
            "a schedule of its own",
            "leave out --schedule",
        )
    if options.epochs < 1:
        raise UsageError("--schedule gradual prunes while it trains", "give --epochs 1 or more")
