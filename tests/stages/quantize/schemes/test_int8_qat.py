"""Int8 QAT rounds as static-int8 does, whatever it trains with."""

from __future__ import annotations

import pytest
import torch

from kdcli.errors import UsageError
from kdcli.stages.quantize.schemes import int8_qat, static_int8


@pytest.mark.parametrize("settings", [{}, {"reduce_range": False}, {"bits": 4}])
def test_integers_are_those_of_static_int8(settings: dict) -> None:
    weight = torch.randn(11, 20, generator=torch.Generator().manual_seed(0))
    mine = int8_qat.quantise(weight, int8_qat.Config(**settings, momentum=0.5, lr=1.0))
    theirs = static_int8.quantise(weight, static_int8.Config(**settings))
    assert torch.equal(mine.values, theirs.values)
    assert torch.equal(mine.scale, theirs.scale)


@pytest.mark.parametrize("settings", [{"momentum": "0"}, {"lr": "0"}, {"alpha": "1.5"}, {"temperature": "0"}])
def test_bad_settings_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        int8_qat.METHOD.configured(settings)
