"""Static int8: the weights are those of dynamic-int8, filters of convolutions are rounded one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.errors import UsageError
from kdcli.stages.quantize.schemes import dynamic_int8, static_int8


@pytest.mark.parametrize("settings", [{}, {"reduce_range": False}, {"unsigned": True}, {"bits": 5}])
def test_matrices_are_those_of_dynamic_int8(settings: dict) -> None:
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    mine = static_int8.quantise(weight, static_int8.Config(**settings))
    theirs = dynamic_int8.quantise(weight, dynamic_int8.Config(**settings))
    assert torch.equal(mine.values, theirs.values)
    assert torch.equal(mine.scale, theirs.scale)


@pytest.mark.parametrize("shape", [(6, 5, 3), (4, 3, 3, 2)])
def test_every_filter_has_its_own_scale(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight *= torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    found = static_int8.quantise(weight, static_int8.Config())
    for number, kernel in enumerate(weight.numpy()):
        scale = np.float32(np.abs(kernel).max() / np.float32(64))
        assert found.scale[number].item() == scale
        assert np.array_equal(found.values[number].numpy(), np.round(kernel / scale).astype(np.int8))
    assert found.dense().shape == weight.shape
    error = (found.dense() - weight).abs().flatten(1).amax(1)
    assert (error <= found.scale.flatten() * 0.5001).all()  # half a step, and float32


def test_settings() -> None:
    assert static_int8.METHOD.configured({"percentile": "99.9"}).percentile == 99.9
    for bad in ("50", "100.5", "high"):
        with pytest.raises(UsageError, match="percentile"):
            static_int8.METHOD.configured({"percentile": bad})
