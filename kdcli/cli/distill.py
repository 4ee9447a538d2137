"""``kdcli distill``."""

from __future__ import annotations

import typer

from kdcli.cli import options as o
from kdcli.cli import values
from kdcli.request import Common, DistillOptions

EXAMPLES = """
kdcli distill --teacher minilm --student tiny --data reviews/ -o out/student
kdcli distill --teacher minilm --student 3x192 --method response --method hidden --layer-map uniform
kdcli distill --teacher minilm --student static --labels 1000 --control
"""


# The parameters from max_drop on are those of every stage: stage.execute reads them from the context.
def command(
    ctx: typer.Context,
    teachers: o.TeachersOpt,
    student: o.StudentOpt,
    methods: o.DistillMethodsOpt = None,
    strategy: o.StrategyOpt = DistillOptions.strategy,
    alpha: o.AlphaOpt = None,
    temperature: o.TemperatureOpt = None,
    beta: o.BetaOpt = None,
    gamma: o.GammaOpt = None,
    weights: o.WeightsOpt = None,
    layer_map: o.LayerMapOpt = None,
    init: o.InitOpt = DistillOptions.init,
    epochs: o.EpochsOpt = None,
    lr: o.LrOpt = None,
    batch_size: o.BatchSizeOpt = None,
    labels: o.LabelsOpt = None,
    unlabeled: o.UnlabeledOpt = None,
    augment: o.AugmentOpt = None,
    control: o.ControlOpt = False,
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
    """A teacher without a head for the task is fine-tuned on the data first, and kept in a cache."""
    from kdcli.cli import stage

    options = DistillOptions(
        teachers=tuple(teachers),
        student=student,
        methods=tuple(methods or DistillOptions.methods),
        strategy=strategy,
        alpha=alpha,
        temperature=temperature,
        beta=beta,
        gamma=gamma,
        weights={name: float(value) for name, value in values.pairs(weights).items()},
        layer_map=layer_map,
        init=init,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        labels=labels,
        unlabeled=unlabeled,
        augment=augment,
        control=control,
    )
    stage.execute(ctx, "distill", options)
