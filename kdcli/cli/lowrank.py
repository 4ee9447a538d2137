"""``kdcli lowrank``."""

from __future__ import annotations

import typer

from kdcli.cli import options as o
from kdcli.request import Common, LowRankOptions

EXAMPLES = """
kdcli lowrank out/pruned --budget 0.6 -o out/lowrank
kdcli lowrank out/pruned --energy 0.95 --exclude "*.layer.0.*" --epochs 1
kdcli lowrank out/pruned --max-drop 0.01 --include embeddings -o out/lowrank
"""


# The parameters from max_drop on are those of every stage: stage.execute reads them from the context.
def command(
    ctx: typer.Context,
    model: o.ModelArg,
    method: o.LowRankMethodOpt = LowRankOptions.method,
    budget: o.ParametersBudgetOpt = None,
    energy: o.EnergyOpt = None,
    rank: o.RankOpt = None,
    target_speedup: o.TargetSpeedupOpt = None,
    merge: o.MergeOpt = LowRankOptions.merge,
    include: o.IncludeOpt = None,
    exclude: o.ExcludeOpt = None,
    epochs: o.RecoveryOpt = LowRankOptions.epochs,
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
    """A layer that would grow is left alone."""
    from kdcli.cli import stage

    budget, energy, rank, target_speedup = stage.exclusive(
        ctx, budget=budget, energy=energy, rank=rank, target_speedup=target_speedup
    )
    options = LowRankOptions(
        method=method,
        budget=budget,
        energy=energy,
        rank=rank if rank is None or rank == "evbmf" else int(rank),
        target_speedup=target_speedup,
        merge=merge,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
    )
    stage.execute(ctx, "lowrank", options, model=model, dequantize=dequantize)
