"""The options of one pruning, checked and typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kdcli import methods
from kdcli.errors import UsageError, did_you_mean
from kdcli.stages.base import STRUCTURES, PruneOptions, Request

SPARSITY = 0.3
"""Used when neither ``--sparsity`` nor ``--budget`` is given."""

SCHEDULES = ("iterative", "one-shot")
UNITS = ("heads", "neurons", "heads+neurons")
ZEROS = ("weights",)


@dataclass
class Plan:
    """What to prune, by which method and how much."""

    options: PruneOptions
    name: str  # of the method
    module: Any
    config: Any
    sparsity: float | None  # None: options.budget counts
    params: dict[str, Any]  # for the report
    training: dict[str, Any] = field(default_factory=dict)  # of the recovery


def check(request: Request) -> Plan:
    """Check the options by themselves, before anything is loaded.

    Raises:
        UsageError: Says which option is wrong and what is allowed.
    """
    options = request.options
    assert isinstance(options, PruneOptions)
    structure = options.structure
    if structure not in STRUCTURES:
        raise UsageError(f"unknown structure '{structure}': {did_you_mean(structure, STRUCTURES)}")
    if (schedule := options.schedule) not in SCHEDULES:
        raise UsageError(f"unknown schedule '{schedule}': {did_you_mean(schedule, SCHEDULES)}")
    name = options.method or STRUCTURES[structure]
    module = methods.load("prune", name)
    if structure not in module.STRUCTURES:
        able = [n for n in methods.names("prune") if structure in methods.load("prune", n).STRUCTURES]
        raise UsageError(f"--method {name} does not prune {structure}; use {' or '.join(able)}")
    if options.sparsity is not None and options.budget is not None:
        raise UsageError("--sparsity and --budget say the same thing in two ways; give one of them")
    if options.sparsity is not None and not 0 <= options.sparsity < 1:
        raise UsageError(f"--sparsity {options.sparsity} is outside [0, 1): it is the share that is removed")
    if options.budget is not None and not 0 < options.budget <= 1:
        raise UsageError(f"--budget {options.budget} is outside (0, 1]: it is the share that is kept")
    if options.budget is not None and structure in ZEROS:
        raise UsageError(
            "--budget is a share of multiply-accumulates, and zeroing weights removes none of them",
            "give --sparsity, or choose --structure heads+neurons",
        )
    if options.epochs < 0:
        raise UsageError(f"--epochs {options.epochs} is negative; 0 means no recovery training")
    config = methods.parse_settings(module, request.common.settings)
    params: dict[str, Any] = {"structure": structure}
    sparsity = None
    if options.budget is not None:
        params |= {"budget": options.budget, "budget_of": "multiply-accumulates of the encoder"}
    else:
        sparsity = SPARSITY if options.sparsity is None else options.sparsity
        of = "encoder weights" if structure in ZEROS else f"multiply-accumulates of the {structure}"
        params |= {"sparsity": sparsity, "sparsity_of": of}
    if structure not in ZEROS:  # magnitudes do not change while they are cut: both schedules are the same
        params["schedule"] = schedule
    params |= config.model_dump() | {"epochs": options.epochs}
    training = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    return Plan(options, name, module, config, sparsity, params, training)
