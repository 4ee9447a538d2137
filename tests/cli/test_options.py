"""Every option reaches the request, and means the same everywhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from kdcli.cli import options
from kdcli.cli.command import COMMANDS, build, flag_of, variable_of
from kdcli.request import STAGES, Common, Gates
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests.cli.conftest import Call
from tests.cli.fakes import Recorder

COMMON_WORDS = shlex.split(
    "-o out/x --data reviews --columns text=body --task regression --metric pearson --device cuda:1 --seed 7 "
    "--limit 50 --force --offline --debug --max-drop 0.01 --min-speedup 2 --max-size 20MiB "
    "--gate accuracy>=0.9 --gate 'p50_ms < 3'"
)
TRAINING_WORDS = shlex.split("--set steps=4 --set scope=layer --resume")
COMMON = Common(
    out=Path("out/x"),
    data="reviews",
    columns="text=body",
    task="regression",
    metric="pearson",
    device="cuda:1",
    seed=7,
    settings={"steps": "4", "scope": "layer"},
    limit=50,
    resume=True,
    force=True,
    offline=True,
    gates=Gates(
        max_drop=0.01, min_speedup=2.0, max_size_bytes=20 << 20, expressions=("accuracy>=0.9", "p50_ms < 3")
    ),
)
CASES: dict[str, tuple[str, Any]] = {
    "distill": (
        "--teacher model --student 3x192 --method response --strategy teacher-assisted --alpha 0.9 --temperature 4 "
        "--beta 0.1 --gamma 0.2 --weight a=1 --weight b=0.5 --layer-map 1:2 --init teacher --epochs 3 --lr 1e-4 "
        "--batch-size 16 --labels 100 --unlabeled more.txt --control",
        DistillOptions(
            teachers=("model",),
            student="3x192",
            methods=("response",),
            strategy="teacher-assisted",
            alpha=0.9,
            temperature=4.0,
            beta=0.1,
            gamma=0.2,
            weights={"a": 1.0, "b": 0.5},
            layer_map="1:2",
            init="teacher",
            epochs=3,
            lr=1e-4,
            batch_size=16,
            labels=100,
            unlabeled=Path("more.txt"),
            control=True,
        ),
    ),
    "prune": (
        "model --structure heads --method taylor --sparsity 0.5 --schedule one-shot --epochs 1 --lr 1e-5 "
        "--batch-size 8",
        PruneOptions(
            structure="heads",
            method="taylor",
            sparsity=0.5,
            schedule="one-shot",
            epochs=1,
            lr=1e-5,
            batch_size=8,
        ),
    ),
    "lowrank": (
        "model --method whitening --rank 8 --include 'a*' --include b --exclude c --epochs 1 --lr 1e-5 --batch-size 8",
        LowRankOptions(
            method="whitening", rank=8, include=("a*", "b"), exclude=("c",), epochs=1, lr=1e-5, batch_size=8
        ),
    ),
    "quantize": (
        "model --scheme dynamic-int8 --calibration minmax --calibration-samples 64 --keep-fp32 'classifier*' "
        "--embeddings fp32 --epochs 2",
        QuantizeOptions(
            scheme="dynamic-int8",
            calibration="minmax",
            calibration_samples=64,
            keep_fp32=("classifier*",),
            embeddings="fp32",
            epochs=2,
        ),
    ),
    "evaluate": (
        "model org/other --baseline minilm --split validation --runtime both --batch-size 1,8 --html a.html "
        "--summary b.md --junit c.xml",
        EvaluateOptions(
            models=("model", "org/other"),
            baseline="minilm",
            split="validation",
            runtime="both",
            batch_sizes=(1, 8),
            html=Path("a.html"),
            summary=Path("b.md"),
            junit=Path("c.xml"),
        ),
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_reaches_the_request(call: Call, recorder: Recorder, stage: str) -> None:
    words, expected = CASES[stage]
    judging = stage == "evaluate"
    result = call(stage, *shlex.split(words), *COMMON_WORDS, *([] if judging else TRAINING_WORDS))
    assert result.code == 0, result.err
    request = recorder.request
    assert request.stage == stage
    assert request.options == expected
    assert request.common == (
        COMMON.model_copy(update={"settings": {}, "resume": False}) if judging else COMMON
    )
    assert request.model == ("model" if words.startswith("model ") and stage != "evaluate" else None)
    fields = {*Common.model_fields, *type(expected).model_fields, *Gates.model_fields} - {"gates"}
    assert fields - type(expected).without <= set(request.origins)
    given = {name for name, origin in request.origins.items() if origin == "flag"}
    assert {"out", "max_size_bytes", "expressions"} <= given


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_those_of_the_models(call: Call, recorder: Recorder, stage: str) -> None:
    needed = {"distill": ["--teacher", "model", "--student", "tiny"]}.get(stage, ["model"])
    assert call(stage, *needed).code == 0
    by_stage: dict[str, dict[str, Any]] = {
        "distill": {"teachers": ("model",), "student": "tiny"},
        "evaluate": {"models": ("model",)},
    }
    required = by_stage.get(stage, {})
    assert recorder.request.options == type(CASES[stage][1])(**required)
    assert recorder.request.common == Common()
    assert {o for name, o in recorder.request.origins.items() if name == "seed"} == {"default"}


@pytest.mark.parametrize("stage", ["prune", "lowrank", "quantize"])
def test_dequantize(call: Call, recorder: Recorder, stage: str) -> None:
    call(stage, "model", "--dequantize")
    call(stage, "model")
    assert [request.dequantize for request in recorder.requests] == [True, False]


def test_budgets(call: Call, recorder: Recorder) -> None:
    call("prune", "model", "--budget", "0.6")
    call("lowrank", "model", "--budget", "0.6")
    call("lowrank", "model", "--energy", "0.9")
    asked = [request.options.model_dump() for request in recorder.requests]
    assert [one["budget"] for one in asked] == [0.6, 0.6, None]
    assert asked[2]["energy"] == 0.9


def test_common_flags_are_those_of_every_stage() -> None:
    found = [{flag_of(param) for param in build(stage).params} for stage in STAGES]
    assert set.intersection(*found) - {None} == set(options.COMMON) - {"set", "resume"}
    assert {"set", "resume"} <= set.intersection(*found[:-1])


def test_the_same_flag_says_the_same_in_every_stage() -> None:
    for flag in options.COMMON:
        params = [p for stage in STAGES for p in build(stage).params if flag_of(p) == flag]
        assert len({(p.help, tuple(p.opts), tuple(p.secondary_opts), p.metavar) for p in params}) == 1, flag


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_help_and_every_option_its_variable(name: str) -> None:
    for param in build(name).params:
        assert param.help, param.name
        if (flag := flag_of(param)) is not None:
            assert param.envvar == variable_of(flag)


def test_short_flags_are_the_published_ones() -> None:
    found: dict[str, str | None] = {}
    for name in COMMANDS:
        for param in build(name).params:
            found |= {short: flag_of(param) for short in param.opts if len(short) == 2}
    assert found == {"-o": "out", "-n": "dry-run", "-f": "force", "-q": "quiet", "-v": "verbose"}


@pytest.mark.parametrize("name", STAGES)
def test_examples_are_valid(call: Call, recorder: Recorder, name: str) -> None:
    module = __import__(f"kdcli.cli.{name}", fromlist=["EXAMPLES"])
    for line in module.EXAMPLES.strip().splitlines():
        for command in line.split(" | "):
            words = shlex.split(command)
            assert words[0] == "kdcli"
            result = call(*words[1:], stdin="model\n")
            assert result.code == 0, f"{command}: {result.err}"
