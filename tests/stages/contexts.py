"""One stage's context on the CPU, without the runner around it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdcli.context import Applied, Context
from kdcli.data import sources
from kdcli.data.sources import Dataset, Rows
from kdcli.inputs.splits import Splits
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.request import Common, Request
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny

STAGES = {QuantizeOptions: "quantize", PruneOptions: "prune", LowRankOptions: "lowrank"}


def rows(count: int, seed: int) -> Rows:
    rng = random.Random(seed)
    texts = [tiny.sentence(rng, i % 2 == 1) for i in range(count)]
    return Rows(texts, None, [tiny.LABELS[i % 2] for i in range(count)])


def of(
    options: QuantizeOptions | PruneOptions | LowRankOptions,
    made: Checkpoint,
    work: Path,
    *,
    splits: dict[str, Rows] | None = None,
    settings: dict[str, str] | None = None,
    seed: int = 0,
) -> Context:
    """The context of the stage that takes these options; without ``splits`` on the rows of `tiny.write_data`."""
    if splits is not None:
        dataset = Dataset("tiny", splits, "0" * 64, list(tiny.LABELS))
    else:
        if not (data := work / "data").is_dir():
            tiny.write_data(data)
        dataset = sources.load(str(data), columns=None, seed=0, offline=True)
    common = Common(seed=seed, settings=settings or {})
    return Context(
        request=Request(stage=STAGES[type(options)], model="m", options=options, common=common),
        checkpoint=made,
        dataset=dataset,
        encoded=Splits(dataset, made),
        device=torch.device("cpu"),
        seed=seed,
        progress=Progress(),
        resume_dir=work / "resume",
    )


def applied(stage: Any, context: Context) -> Applied:
    """What a stage makes of a context, prepared and applied."""
    return stage.STAGE.apply(context, stage.STAGE.prepare(context))


def without_data(context: Context) -> Context:
    """For a stage that must look at no data: there is none."""
    return replace(context, dataset=None, encoded={})  # type: ignore[arg-type]
