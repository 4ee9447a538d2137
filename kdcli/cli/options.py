"""Every option once, as an Annotated alias.

A parameter is called as the field of ``kdcli.request`` that it fills; its flag is written here.
``KDCLI_<FLAG>`` variables and the keys of kdcli.toml follow from the flag (see ``command.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli import request as base
from kdcli.cli import values


def _option(
    *flags: str, help: str, parse: Any = None, names: Callable[..., Any] | None = None, **more: Any
) -> Any:
    if any("/" in flag for flag in flags):
        more["show_default"] = False  # "no-force" says nothing
    return typer.Option(
        *flags,
        help=help,
        parser=None if parse is None else values.explained(parse),
        autocompletion=None if names is None else values.offer(names),
        show_envvar=False,
        **more,
    )


def _method(family: str, help: str) -> Any:
    names = values.methods(family)
    return _option(
        "--method", help=help, parse=values.one_of(f"{family} method", names), names=names, metavar="NAME"
    )


# --- what goes in --------------------------------------------------------------------------------

_MODEL = {"parser": values.explained(values.model), "autocompletion": values.offer(values.model_aliases)}
ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, an alias, org/name[@revision], or - for a line of stdin.",
        **_MODEL,
    ),
]
ModelsArg = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Directories, .onnx files, aliases, org/name[@revision], or - for lines of stdin.",
        **_MODEL,
    ),
]
TeachersOpt = Annotated[
    list[str],
    _option(
        "--teacher",
        help="The model to imitate; repeatable, the answers of several are averaged.",
        parse=values.model,
        names=values.model_aliases,
        metavar="MODEL",
    ),
]
StudentOpt = Annotated[
    str,
    _option(
        "--student",
        help="tiny, mini, small, medium or LxH (layers x hidden size); static, cnn or bilstm, without a "
        "transformer; or a model directory.",
        parse=values.student,
        names=values.students,
        metavar="STUDENT",
    ),
]
BaselineOpt = Annotated[
    str | None,
    _option(
        "--baseline",
        help="Compare with this model.",
        parse=values.model,
        names=values.model_aliases,
        metavar="MODEL",
    ),
]

# --- distill -------------------------------------------------------------------------------------

DistillMethodsOpt = Annotated[
    list[str] | None, _method("distill", "A term of the loss; repeatable. [default: response]")
]
StrategyOpt = Annotated[
    str,
    _option(
        "--strategy",
        help="Who teaches whom, and when.",
        parse=values.one_of("strategy", lambda: base.STRATEGIES),
        names=lambda: base.STRATEGIES,
        metavar="NAME",
    ),
]
AlphaOpt = Annotated[
    float | None,
    _option("--alpha", help="Weight of the teacher's answers, 0 to 1.", parse=values.real(0, 1), metavar="F"),
]
TemperatureOpt = Annotated[
    float | None,
    _option(
        "--temperature",
        help="T, softens both models' answers.",
        parse=values.real(0, above=True),
        metavar="F",
    ),
]
BetaOpt = Annotated[
    float | None,
    _option(
        "--beta",
        help="Weight of the feature terms. [default: the method's own]",
        parse=values.real(0),
        metavar="F",
    ),
]
GammaOpt = Annotated[
    float | None,
    _option(
        "--gamma",
        help="Weight of the relation terms. [default: the method's own]",
        parse=values.real(0),
        metavar="F",
    ),
]
WeightsOpt = Annotated[
    list[str] | None,
    _option(
        "--weight", help="Weight of any further term; repeatable.", parse=values.weight, metavar="NAME=VALUE"
    ),
]
LayerMapOpt = Annotated[
    str | None,
    _option(
        "--layer-map",
        help="Which teacher layer a student layer follows: uniform, last, bottom, top, or 1:2,2:4.",
        parse=values.layer_map,
        names=values.layer_maps,
        metavar="MAP",
    ),
]
InitOpt = Annotated[
    str,
    _option(
        "--init",
        help="The student's first weights: auto, teacher, hub or random.",
        parse=values.one_of("init", lambda: base.INITS),
        names=lambda: base.INITS,
        metavar="NAME",
    ),
]
LabelsOpt = Annotated[
    int | None,
    _option(
        "--labels",
        help="Use the labels of N training rows only, and of as small a share of the validation rows; "
        "the rest teaches unlabelled.",
        parse=values.whole(1),
        metavar="N",
    ),
]
UnlabeledOpt = Annotated[
    Path | None, _option("--unlabeled", help="Further texts without labels.", metavar="FILE")
]
AugmentOpt = Annotated[
    int | None,
    _option(
        "--augment",
        help="Further texts a row, made from it and labelled by the teacher. [default: by the rows]",
        parse=values.whole(0),
        metavar="N",
    ),
]
ControlOpt = Annotated[
    bool,
    _option(
        "--control/--no-control",
        help="Also train the same student without the teacher: on the labels, and on the further texts too.",
    ),
]

# --- training ------------------------------------------------------------------------------------

EpochsOpt = Annotated[
    int | None, _option("--epochs", help="Passes over the training rows.", parse=values.whole(1), metavar="N")
]
RecoveryOpt = Annotated[
    int,
    _option("--epochs", help="Passes of recovery training, 0 for none.", parse=values.whole(0), metavar="N"),
]
LrOpt = Annotated[
    float | None, _option("--lr", help="Learning rate.", parse=values.real(0, above=True), metavar="F")
]
BatchSizeOpt = Annotated[
    int | None, _option("--batch-size", help="Rows a training step.", parse=values.whole(1), metavar="N")
]

# --- prune ---------------------------------------------------------------------------------------

StructureOpt = Annotated[
    str,
    _option(
        "--structure",
        help="What is removed; + joins vocab, layers, width, heads and neurons; N:M, such as 2:4, zeros all but N "
        "of M neighbours.",
        parse=values.structure,
        names=lambda: base.STRUCTURE_NAMES,
        metavar="NAME",
    ),
]
PruneMethodOpt = Annotated[str | None, _method("prune", "How importance is judged. [default: by structure]")]
SparsityOpt = Annotated[
    float | None,
    _option(
        "--sparsity",
        help="Fraction removed. [default: 0.3; with --max-drop the most that keeps it]",
        parse=values.real(0, 1, below=True),
        metavar="F",
    ),
]
MacsBudgetOpt = Annotated[
    float | None,
    _option("--budget", help="Fraction of MACs kept.", parse=values.real(0, 1, above=True), metavar="F"),
]
TargetSpeedupOpt = Annotated[
    float | None,
    _option(
        "--target-speedup",
        help="How many times faster at batch 1, by latencies measured on this machine.",
        parse=values.real(1, above=True),
        metavar="F",
    ),
]
ScheduleOpt = Annotated[
    str | None,
    _option(
        "--schedule",
        help="gradual: prune while --epochs train. iterative (default of taylor and fisher) or one-shot: how often "
        "they score the model again.",
        parse=values.one_of("schedule", lambda: values.SCHEDULES),
        names=lambda: values.SCHEDULES,
        metavar="NAME",
    ),
]

# --- lowrank -------------------------------------------------------------------------------------

LowRankMethodOpt = Annotated[str, _method("lowrank", "How a matrix is factorised.")]
ParametersBudgetOpt = Annotated[
    float | None,
    _option(
        "--budget",
        help="Fraction of parameters kept in the factorised layers.",
        parse=values.real(0, 1, above=True),
        metavar="F",
    ),
]
EnergyOpt = Annotated[
    float | None,
    _option(
        "--energy", help="Fraction of energy kept a layer.", parse=values.real(0, 1, above=True), metavar="F"
    ),
]
RankOpt = Annotated[
    str | None,
    _option("--rank", help="The same rank everywhere, or evbmf.", parse=values.rank, metavar="N|evbmf"),
]
MergeOpt = Annotated[bool, _option("--merge", help="Multiply factors back where that is smaller or faster.")]
IncludeOpt = Annotated[
    list[str] | None, _option("--include", help="Only layers of this glob; repeatable.", metavar="PATTERN")
]
ExcludeOpt = Annotated[
    list[str] | None, _option("--exclude", help="No layers of this glob; repeatable.", metavar="PATTERN")
]

# --- quantize ------------------------------------------------------------------------------------

SchemeOpt = Annotated[
    str,
    _option(
        "--scheme",
        help="Number format of weights and activations.",
        parse=values.one_of("scheme", lambda: base.SCHEMES),
        names=lambda: base.SCHEMES,
        metavar="NAME",
    ),
]
CalibrationOpt = Annotated[
    str | None, _option("--calibration", help="How activation ranges are chosen.", metavar="NAME")
]
CalibrationSamplesOpt = Annotated[
    int, _option("--calibration-samples", help="Rows to calibrate on.", parse=values.whole(1), metavar="N")
]
KeepFp32Opt = Annotated[
    list[str] | None,
    _option("--keep-fp32", help="Leave layers of this glob alone; repeatable.", metavar="PATTERN"),
]
EmbeddingsOpt = Annotated[
    str | None,
    _option(
        "--embeddings",
        help="Format of the embedding tables: int8, int4, fp16 or fp32; by default the scheme's own.",
        parse=values.one_of("embedding format", lambda: base.EMBEDDINGS),
        names=lambda: base.EMBEDDINGS,
        metavar="NAME",
    ),
]
SensitivityOpt = Annotated[
    bool,
    _option(
        "--sensitivity", help="Measure what each layer loses when it alone is quantised, and when it is kept."
    ),
]
QatEpochsOpt = Annotated[
    int,
    _option("--epochs", help="Passes of quantisation-aware training.", parse=values.whole(0), metavar="N"),
]
DequantizeOpt = Annotated[
    bool,
    _option("--dequantize/--no-dequantize", help="Accept a quantised model: work on its rounded weights."),
]

# --- evaluate ------------------------------------------------------------------------------------

SplitOpt = Annotated[
    str | None, _option("--split", help="Rows to judge on. [default: test, else validation]", metavar="NAME")
]
RuntimeOpt = Annotated[
    str,
    _option(
        "--runtime",
        help="What runs the models: onnx, torch or both.",
        parse=values.one_of("runtime", lambda: values.RUNTIMES),
        names=lambda: values.RUNTIMES,
        metavar="NAME",
    ),
]
BatchSizesOpt = Annotated[
    str, _option("--batch-size", help="Batch sizes to time.", parse=values.batch_sizes, metavar="N,N")
]
HtmlOpt = Annotated[Path | None, _option("--html", help="Write one self-contained page.", metavar="FILE")]
SummaryOpt = Annotated[
    Path | None, _option("--summary", help="Append Markdown, as for $GITHUB_STEP_SUMMARY.", metavar="FILE")
]
JunitOpt = Annotated[Path | None, _option("--junit", help="Write the gates as JUnit XML.", metavar="FILE")]

# --- gates ---------------------------------------------------------------------------------------

MaxDropOpt = Annotated[
    float | None,
    _option(
        "--max-drop",
        help="Gate: accuracy may fall by at most this; 0.01 is one point.",
        parse=values.real(0, 1),
        metavar="F",
    ),
]
MinSpeedupOpt = Annotated[
    float | None,
    _option(
        "--min-speedup", help="Gate: at least this many times faster.", parse=values.real(0), metavar="F"
    ),
]
MaxSizeOpt = Annotated[
    int | None,
    _option("--max-size", help="Gate: model.onnx, such as 20MiB.", parse=values.size, metavar="SIZE"),
]
GatesOpt = Annotated[
    list[str] | None,
    _option("--gate", help='Gate such as "accuracy>=0.9"; repeatable.', parse=values.gate, metavar="EXPR"),
]

# --- common to the stages ------------------------------------------------------------------------

OutOpt = Annotated[
    Path | None,
    _option("-o", "--out", help="Output directory. [default: kdcli-out/MODEL-STAGE]", metavar="DIR"),
]
DataOpt = Annotated[
    str | None,
    _option(
        "--data",
        help="An alias, a directory, a file or a hub data set. [default: the model's own]",
        names=values.data_aliases,
        metavar="REF",
    ),
]
ColumnsOpt = Annotated[
    str | None,
    _option(
        "--columns",
        help="Column names, such as text=body,label=topic; label=topic:ids for numbers of the model's labels.",
        metavar="MAP",
    ),
]
DeviceOpt = Annotated[
    str,
    _option(
        "--device",
        help="auto, cpu, cuda[:N] or mps.",
        parse=values.device,
        names=lambda: values.DEVICES,
        metavar="NAME",
    ),
]
SeedOpt = Annotated[
    int, _option("--seed", help="Random seed.", parse=values.whole(0, 2**32 - 1), metavar="N")
]
SettingsOpt = Annotated[
    list[str] | None,
    _option("--set", help="A parameter of the method; repeatable.", parse=values.pair, metavar="KEY=VALUE"),
]
LimitOpt = Annotated[
    int | None,
    _option(
        "--limit",
        help="Measure on at most N rows, every label in its share.",
        parse=values.whole(1),
        metavar="N",
    ),
]
ResumeOpt = Annotated[bool, _option("--resume/--no-resume", help="Go on where an interrupted run stopped.")]
ForceOpt = Annotated[bool, _option("-f", "--force/--no-force", help="Replace an output that kdcli wrote.")]
DryRunOpt = Annotated[
    bool, _option("-n", "--dry-run/--no-dry-run", help="Print the plan and estimates, touch nothing.")
]
JsonOpt = Annotated[bool, _option("--json/--no-json", help="JSON on stdout instead of text.")]
OfflineOpt = Annotated[bool, _option("--offline/--no-offline", help="Never use the network.")]
QuietOpt = Annotated[bool, _option("-q", "--quiet/--no-quiet", help="Only errors on stderr.")]
VerboseOpt = Annotated[bool, _option("-v", "--verbose/--no-verbose", help="More on stderr.")]
DebugOpt = Annotated[bool, _option("--debug/--no-debug", help="Tracebacks of errors.")]

COMMON = (
    "out",
    "data",
    "columns",
    "device",
    "seed",
    "set",
    "limit",
    "resume",
    "force",
    "dry-run",
    "json",
    "offline",
    "quiet",
    "verbose",
    "debug",
    "max-drop",
    "min-speedup",
    "max-size",
    "gate",
)
"""Flags of every stage; the keys that kdcli.toml may have outside a command's table."""
