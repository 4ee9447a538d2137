"""Weight-only integers in blocks: their settings, and the ways of rounding that they choose among."""

from __future__ import annotations

import pytest
import torch

from kdcli import registry
from kdcli.errors import UsageError
from kdcli.stages.quantize import plan as plans
from kdcli.stages.quantize.scheme import WeightRounding
from kdcli.stages.quantize.schemes import int4
from kdcli.stages.quantize.schemes.int4 import Config


def test_its_settings() -> None:
    config = int4.METHOD.configured({"bits": "3", "rounding": "hqq", "group": "128"})
    assert (config.bits, config.rounding, config.group) == (3, "hqq", 128)
    assert int4.METHOD.embeddings == "int4"


def test_a_block_divides_the_width() -> None:
    assert int4.group(torch.zeros(2, 96), Config(group=64)) == 32
    assert int4.group(torch.zeros(2, 40), Config()) is None


def test_every_file_of_rounding_can_be_chosen() -> None:
    for name in registry.names("rounding"):
        found = plans.settle("int4", {"rounding": name})
        assert found.rounding is registry.load("rounding", name, WeightRounding)
        assert (found.rounding.of_weight is None) != (found.rounding.of_inputs is None)
        assert type(found.inner) is found.rounding.config
    with pytest.raises(UsageError, match="unknown rounding 'gtpq': did you mean 'gptq'"):
        plans.settle("int4", {"rounding": "gtpq"})


def test_settings_go_to_the_rounding_that_was_chosen() -> None:
    found = plans.settle("int4", {"rounding": "hqq", "iterations": "3", "bits": "5"})
    assert (found.config.bits, found.inner.iterations) == (5, 3)
    assert plans.settle("int4", {"gptq.damp": "0.5"}).inner.damp == 0.5
    with pytest.raises(UsageError, match="unknown setting 'iterations'") as caught:
        plans.settle("int4", {"iterations": "3"})
    assert caught.value.hint == "iterations is a setting of hqq"
