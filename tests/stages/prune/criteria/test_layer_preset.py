"""Which layers stay by place: the tables of the definition, and lists by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from torch import nn

from kdcli import families
from kdcli.errors import UsageError
from kdcli.stages.prune.criteria import layer_preset
from kdcli.stages.prune.criteria.layer_preset import Config, preset
from kdcli.stages.prune.criterion import LayerJob


def job_of(prices: list[float], remove: float) -> LayerJob:
    return LayerJob(nn.Identity(), families.of("bert"), np.array(prices), remove, [])


@pytest.mark.parametrize(
    ("name", "layers", "count", "kept"),
    [
        ("bottom", 6, 4, [0, 1, 2, 3]),
        ("top", 6, 4, [2, 3, 4, 5]),
        ("alternate", 6, 3, [0, 2, 5]),
        ("alternate", 12, 6, [0, 2, 4, 7, 9, 11]),
        ("alternate", 6, 1, [0]),
        ("alternate", 6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_presets(name: str, layers: int, count: int, kept: list[int]) -> None:
    assert preset(name, layers, count) == kept  # type: ignore[arg-type]


def test_alternate_names_every_layer_once() -> None:
    for layers in range(1, 25):
        for count in range(1, layers + 1):
            kept = preset("alternate", layers, count)
            assert len(set(kept)) == count
            assert kept == sorted(kept)
            assert count == 1 or (kept[0], kept[-1]) == (0, layers - 1)


def test_as_many_go_as_the_budget_asks_for_and_one_stays() -> None:
    assert layer_preset.choose(job_of([1.0] * 6, 3), Config()).keep == [0, 1, 2]
    assert layer_preset.choose(job_of([1.0] * 6, 0), Config()).keep == [0, 1, 2, 3, 4, 5]
    # The last layers cost nothing, so more of them go than one.
    assert layer_preset.choose(job_of([1.0, 1.0, 0.5, 0.5], 1), Config()).keep == [0, 1]
    assert layer_preset.choose(job_of([1.0, 1.0, 0.5, 0.5], 1), Config(preset="top")).keep == [1, 2, 3]
    assert layer_preset.choose(job_of([1.0] * 3, 2.9), Config()).keep == [0]


def test_a_list_by_hand_counts_alone() -> None:
    assert layer_preset.choose(job_of([1.0] * 6, 1), Config(keep="5, 0,2")).keep == [0, 2, 5]
    with pytest.raises(UsageError, match="layers 0 to 5"):
        layer_preset.choose(job_of([1.0] * 6, 1), Config(keep="0,6"))
    for wrong in ("", "0,0", "a", "1-3", "-1"):
        with pytest.raises(ValidationError, match="different layers"):
            Config(keep=wrong)
