r"""Layer preset: keep layers by their place alone, or exactly those that are named.

Of $L$ layers, $n$ stay:

- ``bottom``: the first $n$
- ``top``: the last $n$
- ``alternate``: $n$ spread evenly, layer $\mathrm{round}(i (L - 1) / (n - 1))$ for $i = 0 \ldots n - 1$; the first
  when $n$ is 1
- ``keep=0,2,5``: those, whatever ``--sparsity`` says

It reads no rows. $n$ is the largest number for which what goes costs as much as it should.

Source: Sajjad, Dalvi, Durrani, Nakov 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models",
arXiv:2004.03844 (top, bottom and alternate dropping; there the names say what is dropped).
Differs: here they say what is kept, and alternate keeps both ends for any n.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kdcli.errors import UsageError
from kdcli.stages.prune.criterion import Criterion, Kept, LayerJob

Preset = Literal["bottom", "top", "alternate"]


class Config(BaseModel):
    """Parameters of keeping layers by place."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    preset: Preset = Field("bottom", description="which layers stay: bottom, top or alternate")
    keep: str | None = Field(None, description="the layers that stay, counted from 0, such as 0,2,5")
    keep_layers: int | None = Field(
        None, ge=1, description="layers that stay; by default from --sparsity or --budget"
    )

    @field_validator("keep")
    @classmethod
    def _listed(cls, given: str | None) -> str | None:
        if given is not None:
            named = [part.strip() for part in given.split(",")]
            if not all(part.isdecimal() for part in named) or len(set(named)) != len(named):
                raise ValueError("different layers with commas between, such as 0,2,5, are needed")
        return given


def preset(name: Preset, layers: int, count: int) -> list[int]:
    """The ``count`` of ``layers`` layers that stay, ascending."""
    if name == "alternate":
        return [int(i) for i in np.round(np.linspace(0, layers - 1, count))]
    return list(range(count)) if name == "bottom" else list(range(layers - count, layers))


def choose(job: LayerJob, config: Config) -> Kept:
    """Keep what the list names, or as many layers as the budget leaves; one stays.

    Raises:
        UsageError: The list names a layer that the model does not have.
    """
    layers = len(job.prices)
    if config.keep is not None:
        named = sorted(int(part) for part in config.keep.split(","))
        if named[-1] >= layers:
            raise UsageError(f"--set keep={config.keep}: the model has the layers 0 to {layers - 1}")
        return Kept(named)
    for count in range(layers, 1, -1):
        kept = preset(config.preset, layers, count)
        if float(job.prices.sum() - job.prices[kept].sum()) >= job.remove * (1 - 1e-9):
            return Kept(kept)
    return Kept(preset(config.preset, layers, 1))


METHOD = Criterion(config=Config, choose=choose)
