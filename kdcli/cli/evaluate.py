"""``kdcli evaluate``."""

from __future__ import annotations

import typer

from kdcli.cli import options as o
from kdcli.request import Common, EvaluateOptions

EXAMPLES = """
kdcli evaluate out/int8 --baseline out/teacher --max-drop 0.01 --min-speedup 2
kdcli evaluate out/student out/pruned out/int8 --html compare.html
"""


# The parameters from max_drop on are those of every stage: stage.execute reads them from the context.
def command(
    ctx: typer.Context,
    models: o.ModelsArg,
    baseline: o.BaselineOpt = None,
    split: o.SplitOpt = None,
    runtime: o.RuntimeOpt = EvaluateOptions.runtime,
    batch_sizes: o.BatchSizesOpt = "1,32",
    html: o.HtmlOpt = None,
    summary: o.SummaryOpt = None,
    junit: o.JunitOpt = None,
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
    """Without --baseline a model is compared with the first one of its own lineage."""
    from kdcli.cli import stage

    options = EvaluateOptions(
        models=tuple(models),
        baseline=baseline,
        split=split,
        runtime=runtime,
        batch_sizes=tuple(int(size) for size in batch_sizes.split(",")),
        html=html,
        summary=summary,
        junit=junit,
    )
    stage.execute(ctx, "evaluate", options)
