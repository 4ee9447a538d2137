"""``kdcli prune``."""

from __future__ import annotations

import typer

from kdcli.cli import options as o
from kdcli.request import Common, PruneOptions

EXAMPLES = """
kdcli prune out/student --structure heads+neurons --sparsity 0.5 -o out/pruned
kdcli prune out/model --structure vocab+layers+heads+neurons --set keep_layers=5 --budget 0.5 --epochs 1
kdcli prune out/student --target-speedup 1.6 -o out/pruned
kdcli distill --teacher minilm --student tiny | kdcli prune - --budget 0.6
"""


# The parameters from max_drop on are those of every stage: stage.execute reads them from the context.
def command(
    ctx: typer.Context,
    model: o.ModelArg,
    structure: o.StructureOpt = PruneOptions.structure,
    method: o.PruneMethodOpt = None,
    sparsity: o.SparsityOpt = None,
    budget: o.MacsBudgetOpt = None,
    target_speedup: o.TargetSpeedupOpt = None,
    schedule: o.ScheduleOpt = None,
    epochs: o.RecoveryOpt = PruneOptions.epochs,
    lr: o.LrOpt = None,
    batch_size: o.BatchSizeOpt = None,
    dequantize: o.DequantizeOpt = False,
    max_drop: o.MaxDropOpt = None,
    min_speedup: o.MinSpeedupOpt = None,
    max_size_bytes: o.MaxSizeOpt = None,
    expressions: o.GatesOpt = None,
    out: o.OutOpt = None,
    data: o.DataOpt = None,
    columns: o.ColumnsOpt = None,
    device: o.DeviceOpt = Common.device,
    seed: o.SeedOpt = Common.seed,
    settings: o.SettingsOpt = None,
    limit: o.LimitOpt = None,
    resume: o.ResumeOpt = False,
    force: o.ForceOpt = False,
    dry_run: o.DryRunOpt = False,
    as_json: o.JsonOpt = False,
    offline: o.OfflineOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
    debug: o.DebugOpt = False,
) -> None:
    """Heads, neurons, layers, features and tokens are cut out; weights only become zero, which saves no time."""
    from kdcli.cli import stage

    sparsity, budget, target_speedup = stage.exclusive(
        ctx, sparsity=sparsity, budget=budget, target_speedup=target_speedup
    )
    options = PruneOptions(
        structure=structure,
        method=method,
        sparsity=sparsity,
        budget=budget,
        target_speedup=target_speedup,
        schedule=schedule,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
    )
    stage.execute(ctx, "prune", options, model=model, dequantize=dequantize)
