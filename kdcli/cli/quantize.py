"""``kdcli quantize``."""

from __future__ import annotations

import typer

from kdcli.cli import options as o
from kdcli.request import Common, QuantizeOptions

EXAMPLES = """
kdcli quantize out/pruned --scheme dynamic-int8 -o out/int8
kdcli prune out/student --sparsity 0.3 | kdcli quantize - --max-drop 0.01 --max-size 5MiB
"""


# The parameters from max_drop on are those of every stage: stage.execute reads them from the context.
def command(
    ctx: typer.Context,
    model: o.ModelArg,
    scheme: o.SchemeOpt = QuantizeOptions.scheme,
    calibration: o.CalibrationOpt = None,
    calibration_samples: o.CalibrationSamplesOpt = QuantizeOptions.calibration_samples,
    keep_fp32: o.KeepFp32Opt = None,
    embeddings: o.EmbeddingsOpt = None,
    sensitivity: o.SensitivityOpt = False,
    epochs: o.QatEpochsOpt = QuantizeOptions.epochs,
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
    """The last stage of a pipeline: integers have no gradients for another one to follow."""
    from kdcli.cli import stage

    options = QuantizeOptions(
        scheme=scheme,
        calibration=calibration,
        calibration_samples=calibration_samples,
        keep_fp32=tuple(keep_fp32 or ()),
        embeddings=embeddings,
        sensitivity=sensitivity,
        epochs=epochs,
    )
    stage.execute(ctx, "quantize", options, model=model, dequantize=dequantize)
